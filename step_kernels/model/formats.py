"""The formats that a model's weights come in besides plain tensors and NVFP4, and how experts in NVFP4 are gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nvfp4 import E4M3_MAX, NVFP4Experts, NVFP4Weight
from ..ops import nvfp4_prepare, prepares
from ..prepared import PreparedWeight

FP8_BLOCK = 128  # rows and columns that share a weight_scale_inv in the FP8 release
_ROWS = 2048  # made FP8 at once: 2048 rows of 12288 are 100 MB in f32


@dataclass(frozen=True)
class FP8Weight:
    """e4m3 [experts, n, k] with f32 scales [experts, ceil(n / 128), ceil(k / 128)], multiplied."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[..., n, k] in `dtype`."""
        n, k = self.codes.shape[-2:]
        scales = self.scales.repeat_interleave(FP8_BLOCK, -2)[..., :n, :].repeat_interleave(FP8_BLOCK, -1)[..., :k]
        return (self.codes.float() * scales).to(dtype)


@dataclass(frozen=True)
class FP8Channels:
    """A linear's weight as e4m3 codes [n, k] and f32 scale [n]: row i is codes[i] * scale[i]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, k] in `dtype`."""
        return (self.codes.float() * self.scale[:, None]).to(dtype)


def fp8_channels(weight: Tensor) -> FP8Channels:
    """A plain [n, k] weight, each row scaled so that its largest value is e4m3's, 448; a row of zeros by 1."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows, out, outer in zip(weight.split(_ROWS), codes.split(_ROWS), scale.split(_ROWS)):
        top = rows.abs().amax(-1).float()
        outer.copy_(torch.where(top == 0, 1.0, top / torch.full_like(top, E4M3_MAX)))
        out.copy_((rows.float() / outer[:, None]).clamp_(-E4M3_MAX, E4M3_MAX))
    return FP8Channels(codes, scale)


@dataclass(frozen=True)
class DenseExperts:
    """gate_up [experts, 2 * inner, hidden] (gate rows first), down [experts, hidden, inner]."""

    gate_up: Tensor
    down: Tensor

    def expert(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.gate_up[e].to(dtype), self.down[e].to(dtype)


@dataclass(frozen=True)
class FP8Experts:
    """The FP8 release's experts, kept at a byte a weight."""

    gate: FP8Weight
    up: FP8Weight
    down: FP8Weight

    def expert(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gate, up, down = (FP8Weight(w.codes[e], w.scales[e]).dequantize(dtype) for w in (self.gate, self.up, self.down))
        return torch.cat((gate, up)), down


def kernel_layout(weight, device: torch.device, dtype: torch.dtype):
    """An NVFP4 weight or experts as the device's kernels for `dtype` read them: prepared, or as they are."""
    return nvfp4_prepare(weight) if dtype == torch.bfloat16 and prepares(device) else weight


def gathered(count: int, step: int, part: Callable[[int, int], NVFP4Experts]) -> NVFP4Experts:
    """`count` experts, of which part(begin, end) makes at most `step` at a time: what it takes besides the result."""
    whole = None
    for begin in range(0, count, step):
        end = min(begin + step, count)
        made = part(begin, end)
        whole = whole or NVFP4Experts(*(_room(w, count) for w in (made.gate_up, made.down)))
        for room, weight in ((whole.gate_up, made.gate_up), (whole.down, made.down)):
            for name in ("codes", "scales", "global_scale"):
                getattr(room, name)[begin:end] = getattr(weight, name)
    return whole


def _room(weight: NVFP4Weight | PreparedWeight, count: int) -> NVFP4Weight | PreparedWeight:
    """The same for `count` experts, unwritten."""
    tensors = {name: getattr(weight, name) for name in ("codes", "scales", "global_scale")}
    room = {name: t.new_empty(count, *t.shape[1:]) for name, t in tensors.items()}
    if isinstance(weight, PreparedWeight):
        room["shape"] = torch.Size((count, *weight.shape[1:]))
    return dataclasses.replace(weight, **room)
