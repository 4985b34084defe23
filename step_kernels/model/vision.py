"""The perception encoder: pixels of square views to features in the language model's hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VisionConfig

EPS = 1e-5
ROPE_THETA = 1e4
VIEWS_AT_ONCE = 8  # a 728-pixel view's widest activation is 2704 x 8960: 8 of them are 388 MB in bfloat16


def rope_2d(rows: int, columns: int, head_dim: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, f32 [rows * columns, head_dim / 2]: the angle of each pair; the first half of the pairs turns by
    the column, the second by the row, both counted in patches from 0 whatever the grid."""
    spread = head_dim // 2
    frequency = ROPE_THETA ** (-torch.arange(0, spread, 2, dtype=torch.float32, device=device) / spread)
    row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
    angle = torch.cat([column[:, None] * frequency, row[:, None] * frequency], -1)
    return angle.cos(), angle.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., tokens, heads, head_dim] with each pair (2j, 2j + 1) turned by the j-th angle; computed in f32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class VisionEncoder:
    """ViT, two stride-2 convolutions, projector. `weights.tensor(name, shape)` gives each tensor, all in one dtype."""

    def __init__(self, config: VisionConfig, hidden_size: int, weights):
        self.config = config
        width, patch = config.width, config.patch_size
        self.grid = config.image_size // patch

        def linear(name: str, outputs: int, inputs: int, joint: str = ".") -> tuple[Tensor, Tensor]:
            return (
                weights.tensor(f"{name}{joint}weight", (outputs, inputs)),
                weights.tensor(f"{name}{joint}bias", (outputs,)),
            )

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return weights.tensor(f"{name}.weight", (width,)), weights.tensor(f"{name}.bias", (width,))

        def downsampler(name: str, outputs: int) -> tuple[Tensor, Tensor]:
            shape = (outputs, outputs // 2, 3, 3)
            return weights.tensor(f"{name}.weight", shape), weights.tensor(f"{name}.bias", (outputs,))

        self.patches = weights.tensor("vision_model.conv1.weight", (width, 3, patch, patch))
        self.positions = weights.tensor("vision_model.positional_embedding", (self.grid**2, width))
        self.norm = norm("vision_model.ln_pre")
        self.blocks = []
        for i in range(config.layers):
            name = f"vision_model.transformer.resblocks.{i}"
            self.blocks.append(
                _Block(
                    config.heads,
                    norm(f"{name}.ln_1"),
                    linear(f"{name}.attn.in_proj", 3 * width, width, "_"),
                    linear(f"{name}.attn.out_proj", width, width),
                    weights.tensor(f"{name}.ls_1.gamma", (width,)),
                    norm(f"{name}.ln_2"),
                    linear(f"{name}.mlp.c_fc", config.mlp_width, width),
                    linear(f"{name}.mlp.c_proj", width, config.mlp_width),
                    weights.tensor(f"{name}.ls_2.gamma", (width,)),
                )
            )
        self.downsamplers = [
            downsampler("vision_model.vit_downsampler1", 2 * width),
            downsampler("vision_model.vit_downsampler2", 4 * width),
        ]
        self.projector = weights.tensor("vit_large_projector.weight", (hidden_size, 4 * width))

    def __call__(self, pixels: Tensor) -> Tensor:
        """f[n, 3, S, S], S a multiple of 4 patches -> [n, (S / (4 * patch))^2, hidden_size], row-major; the weights'
        dtype and device; ValueError on another shape."""
        unit = 4 * self.config.patch_size
        side = pixels.shape[-1] if pixels.dim() == 4 else 0
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, side, side) or side == 0 or side % unit:
            raise ValueError(
                f"pixel_values: got {list(pixels.shape)}, wanted [views, 3, side, side], side a multiple of {unit}"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixel_values: got {pixels.dtype}, wanted normalised pixels in a floating-point dtype")
        grid = side // self.config.patch_size
        positions = self._positions(grid)
        cos, sin = rope_2d(grid, grid, self.config.width // self.config.heads, self.patches.device)
        return torch.cat([self._views(views, positions, cos, sin) for views in pixels.split(VIEWS_AT_ONCE)])

    def _positions(self, grid: int) -> Tensor:
        """The positional embedding [grid * grid, width], bilinear between the trained grid's points for another one."""
        if grid == self.grid:
            return self.positions
        square = self.positions.float().T.unflatten(1, (self.grid, self.grid))[None]
        square = F.interpolate(square, (grid, grid), mode="bilinear", align_corners=False)
        return square[0].flatten(1).T.to(self.positions.dtype)

    def _views(self, pixels: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = F.conv2d(pixels.to(self.patches), self.patches, stride=self.config.patch_size)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + positions
        x = _layer_norm(x, self.norm)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = x.transpose(1, 2).unflatten(2, grid)
        for weight, bias in self.downsamplers:
            x = F.conv2d(x, weight, bias, stride=2, padding=1)
        return F.linear(x.flatten(2).transpose(1, 2), self.projector)


class _Block:
    """One pre-norm transformer block; each branch is scaled by its gamma before it is added."""

    def __init__(self, heads, norm_1, in_proj, out_proj, gamma_1, norm_2, c_fc, c_proj, gamma_2):
        self.heads = heads
        self.norm_1, self.in_proj, self.out_proj, self.gamma_1 = norm_1, in_proj, out_proj, gamma_1
        self.norm_2, self.c_fc, self.c_proj, self.gamma_2 = norm_2, c_fc, c_proj, gamma_2

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.gamma_1 * self._attention(_layer_norm(x, self.norm_1), cos, sin)
        inner = F.linear(_layer_norm(x, self.norm_2), *self.c_fc)
        inner = inner * torch.sigmoid(1.702 * inner)  # quick_gelu
        return x + self.gamma_2 * F.linear(inner, *self.c_proj)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = F.linear(x, *self.in_proj).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return F.linear(out.transpose(1, 2).flatten(2), *self.out_proj)


def _layer_norm(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, EPS)
