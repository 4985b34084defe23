"""NVFP4, the format: e2m1 codes in blocks of 16 along k, one e4m3 scale a block, one f32 scale a tensor.

value = e2m1(code) * (block_scale * global_scale). Two codes share a byte, the even k in the low nibble.
Everything here is plain torch and runs on any device; the kernels must agree with it bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # the smallest positive e4m3
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SEARCHES = ("mse", "max", "four-six")
# Offsets from the `max` rule's scale code to the best code: on Gaussian, Student-t and outlier weights
# all but 0-6 of 65,536 blocks have their optimum here, and the MSE equals the 126-code sweep's to six digits.
_MSE_OFFSETS = (0, 1, -1, 2, -2, 3, 4, 5, 6)  # ties go to the smaller |offset|


@dataclass(frozen=True)
class NVFP4Weight:
    """A [..., n, k] weight in checkpoint layout.

    codes u8 [..., n, k/2]; scales e4m3 [..., n, k/16]; global_scale f32 [...] or [..., parts], where each of
    the `parts` equal ranges of n has a scale of its own (gate and up of a fused SwiGLU weight).
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., n, k] in `dtype`."""
        lead = self.codes.dim() - 2
        if self.global_scale.dim() == lead:
            return dequantize(self.codes, self.scales, self.global_scale, dtype)
        parts = self.global_scale.shape[-1]
        codes, scales = (t.unflatten(-2, (parts, -1)) for t in (self.codes, self.scales))
        return dequantize(codes, scales, self.global_scale, dtype).flatten(-3, -2)

    def __getitem__(self, expert: int | slice) -> NVFP4Weight:
        return NVFP4Weight(self.codes[expert], self.scales[expert], self.global_scale[expert])


@dataclass(frozen=True)
class NVFP4Experts:
    """gate_up [experts, 2 * inner, hidden] (gate rows first) and down [experts, hidden, inner]."""

    gate_up: NVFP4Weight
    down: NVFP4Weight


def e2m1_encode(x: Tensor) -> Tensor:
    """[...] float -> u8 codes 0-15: nearest of E2M1, ties to the even code, saturating. NaN becomes 7 (6.0)."""
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    # Each tie lies between code c and c + 1; it belongs to the even one, hence `>` and `>=` in turn.
    for i, tie in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += ~(a <= tie) if i % 2 == 0 else ~(a < tie)
    return code | ((x < 0).to(torch.uint8) << 3)


def e2m1_decode(codes: Tensor) -> Tensor:
    """u8 codes 0-15 -> f32."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


def e2m1_round(x: Tensor) -> Tensor:
    """[...] f32 -> e2m1_decode(e2m1_encode(x)) without the codes in between; -0 becomes 0."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1)  # 2^exponent: 1, 2 or 4
    # E2M1 steps by power / 2. At 1.5 * 2^23 steps f32's own spacing is one step, so the sum rounds ties to even.
    shift = power.mul_(0.5 * 1.5 * 2**23)
    return x.add_(shift).sub_(shift)


def pack(codes: Tensor) -> Tensor:
    """u8 [..., k] codes 0-15 -> u8 [..., k/2], even k in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """u8 [..., k/2] -> u8 [..., k] codes 0-15."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def global_scale(amax: Tensor, search: str = "max") -> Tensor:
    """amax f32 [...] -> f32 [...]: amax / (6 * 448), for `four-six` amax / (6 * 256). All-zero tensors get 1."""
    top = 256.0 if search == "four-six" else E4M3_MAX
    # By a tensor: dividing by a number, CUDA multiplies by its inverse, which can be one ulp off.
    return torch.where(amax == 0, 1.0, amax.float() / torch.full_like(amax, E2M1_MAX * top, dtype=torch.float32))


def search_scales(x: Tensor, global_scale: Tensor, search: str = "max") -> Tensor:
    """[..., k] float, f32 [...] -> block scales e4m3 [..., k/16].

    `max`: block amax / 6. `four-six`: that or amax / 4, whichever errs less (arXiv 2512.02010).
    `mse`: the e4m3 code with the least squared error among nine around `max`'s. A zero block's scale is 1.
    """
    blocks, outer = _blocks(x, global_scale)
    best, *others = candidate_scales(blocks.abs().amax(-1), outer, search)
    error = _block_error(blocks, best, outer) if others else None
    for candidate in others:
        e = _block_error(blocks, candidate, outer)
        better = e < error  # never in a zero block, whose errors are all 0
        # float8 has no torch.where on every device: choose among the codes
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(torch.float8_e4m3fn)
        error = torch.where(better, e, error)
    return best


def candidate_scales(amax: Tensor, outer: Tensor, search: str) -> list[Tensor]:
    """Amax of blocks f32 [...] -> the e4m3 scales [...] that a search chooses from, the first where errors tie."""
    scale = _e4m3(torch.where(amax == 0, 1.0, amax / (E2M1_MAX * outer)))
    if search == "max":
        return [scale]
    if search == "four-six":
        return [scale, _e4m3(1.5 * amax / (E2M1_MAX * outer))]
    if search == "mse":
        code = scale.view(torch.uint8).int()
        return [(code + d).clamp(1, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn) for d in _MSE_OFFSETS]
    raise ValueError(f"search: got {search!r}, wanted one of {', '.join(SEARCHES)}")


def quantize(x: Tensor, global_scale: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[..., k] float, f32 [...] -> codes u8 [..., k/2], scales e4m3 [..., k/16]; `max` scales unless given.

    The division is by the product block_scale * global_scale, as in nvidia-modelopt.
    """
    blocks, outer = _blocks(x, global_scale)
    if scales is None:
        scales = search_scales(x, global_scale)
    codes = e2m1_encode(blocks / (scales.float() * outer)[..., None])
    return pack(codes.flatten(-2)), scales


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """u8 [..., k/2], e4m3 [..., k/16], f32 [...] -> [..., k]; the product in f32 (f64 for a float64 dtype)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = e2m1_decode(unpack(codes)).to(compute).unflatten(-1, (-1, BLOCK))
    scale = scales.to(compute) * _outer(global_scale, scales.dim()).to(compute)
    return (values * scale[..., None]).flatten(-2).to(dtype)


def _blocks(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[-1] % BLOCK:
        raise ValueError(f"x: got last dimension {x.shape[-1]}, wanted a multiple of {BLOCK}")
    return x.float().unflatten(-1, (-1, BLOCK)), _outer(global_scale, x.dim())


def _outer(global_scale: Tensor, dims: int) -> Tensor:
    return global_scale.float().reshape(global_scale.shape + (1,) * (dims - global_scale.dim()))


def _e4m3(scale: Tensor) -> Tensor:
    return scale.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def squared_error(x: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    """Squared error f32 of values at a block scale f32, in units of outer^2: extreme weights' squares leave f32."""
    values = e2m1_round(x / (scale * outer)).mul_(scale)
    return values.sub_(x / outer).square_()


def _block_error(blocks: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    error = squared_error(blocks, scale.float()[..., None], outer[..., None])
    total = error[..., 0]
    for i in range(1, BLOCK):  # one after the other, not in the device's order: near ties choose alike everywhere
        total = total + error[..., i]
    return total
