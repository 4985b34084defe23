"""Codes and block scales of a 16-bit weight on a CPU, looked up: the bits of step_kernels/nvfp4.py, faster.

A 16-bit float has 32,768 magnitudes, of which a matrix uses some thousands, and its blocks some dozens of scale codes.
So nvfp4.py's own arithmetic is done once for each pair of a magnitude and a scale; a table's row then has the errors of
a weight at neighbouring scales side by side, and embedding_bag sums the rows of a block's 16 weights in their order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import nvfp4

_SLAB = 1 << 15  # blocks worked on at a time: small enough for the caches, large enough that Python is idle
_WINDOW = 16  # scales summed at a time, one AVX-512 register: a search's candidates lie within nine neighbours
_PAIRS = 1 << 18  # of a magnitude and a scale, at most: a table of 16 MB. An expert of Gaussian weights has 90,000
_MAGNITUDE = 0x7FFF


@torch.no_grad()
def quantize(x: Tensor, outer: Tensor, search: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """[n, k] finite bf16 or f16, f32 [] -> codes u8 [n, k/2], scales as u8 [n, k/16], f64 [2]: squared error, size.

    None for what is not looked up: other types and devices, and weights of too many magnitudes.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    n, k = x.shape
    bits = x.contiguous().view(torch.int16).view(-1, nvfp4.BLOCK)
    tops = torch.cat([_amax(slab & _MAGNITUDE) for slab in bits.split(_SLAB)])
    tables = _Tables(bits, tops, x.dtype, outer)
    if not tables.fill(tops, search):
        return None
    codes = torch.empty(n, k // 2, dtype=torch.uint8)
    scales = torch.empty(n, k // nvfp4.BLOCK, dtype=torch.uint8)
    sums = torch.zeros(2, dtype=torch.float64)
    slabs = (t.split(_SLAB) for t in (bits, tops, codes.view(-1, nvfp4.BLOCK // 2), scales.view(-1)))
    for slab, top, some_codes, some_scales in zip(*slabs):
        sums[0] += tables.quantize(slab, top, some_codes, some_scales)
        sums[1] += slab.view(x.dtype).float().square_().sum(dtype=torch.float64)
    return codes, scales, sums


class _Tables:
    """By magnitude (a row; zero's is the first) and scale code (a column): code, its error, and the search's error."""

    def __init__(self, bits: Tensor, tops: Tensor, dtype: torch.dtype, outer: Tensor):
        self.low = min(_smallest(slab & _MAGNITUDE) for slab in bits.split(_SLAB))
        rows = torch.arange(self.low - 1, max(int(tops.amax()), self.low) + 1, dtype=torch.int16)
        rows[0] = 0
        self.x, self.outer = rows.view(dtype).float(), outer

    def fill(self, tops: Tensor, search: str) -> bool:
        """Works out the tables for blocks of these amax; False where they would be too large."""
        candidates = nvfp4.candidate_scales(self.x, self.outer, search)
        self.candidates = torch.stack([c.view(torch.uint8).int() for c in candidates])
        self.candidates[:, 0] = self.candidates[0, 0]  # a zero block's, and only that
        # Scales grow with amax, but for a zero block's.
        ends = torch.tensor([int(tops.amin()), _smallest(tops), int(tops.amax())], dtype=torch.int16)
        used = self.candidates[:, self.row(ends)]
        self.first, last = int(used.min()), int(used.max())
        self.width = last - self.first + 1
        if len(self.x) * self.width > _PAIRS:
            return False
        x = self.x[:, None]
        scale = torch.arange(self.first, last + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        ratio = x / (scale * self.outer)
        codes = nvfp4.e2m1_encode(ratio)
        self.error = (nvfp4.e2m1_decode(codes) * (scale * self.outer)).sub_(x).square_().view(-1)
        self.codes = (codes | ((ratio > 0).to(torch.uint8) << 3)).view(-1)  # bit 3: negative, if the weight is
        if len(candidates) > 1:
            searched = torch.cat((nvfp4.squared_error(x, scale, self.outer).view(-1), torch.zeros(_WINDOW)))
            self.windows = searched.as_strided((len(self.codes), _WINDOW), (1, 1)).contiguous()
        return True

    def row(self, magnitude: Tensor) -> Tensor:
        """int16 -> i32."""
        return (magnitude - (self.low - 1)).clamp_(min=0).int()

    def quantize(self, bits: Tensor, tops: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """int16 [blocks, 16], [blocks] -> f64 [], the squared error; fills u8 [blocks, 8] and [blocks]."""
        tops = self.row(tops)
        candidates = torch.stack([c.index_select(0, tops) for c in self.candidates])  # [candidates, blocks]
        at = self.row(bits & _MAGNITUDE).mul_(self.width)
        chosen = candidates[0] if len(candidates) == 1 else self.search(at, candidates)
        scales.copy_(chosen)
        at += (chosen - self.first)[:, None]
        at = at.view(-1)
        code = self.codes.index_select(0, at)
        code &= (bits >> 15 | 7).to(torch.uint8).view(-1)
        pair = code.view(torch.int16)  # the odd weight's in the high byte
        codes.copy_((pair | pair >> 4).view(torch.uint8)[::2].view_as(codes))
        return self.error.index_select(0, at).sum(dtype=torch.float64)

    def search(self, row: Tensor, candidates: Tensor) -> Tensor:
        """Of each block's candidates i32 [candidates, blocks] the first with the least error, [blocks]."""
        first = candidates.amin(0)
        errors = F.embedding_bag(row + (first - self.first)[:, None], self.windows, mode="sum")  # [blocks, window]
        where = candidates - first + torch.arange(len(errors), dtype=torch.int32) * _WINDOW
        errors = errors.view(-1).index_select(0, where.view(-1)).view(candidates.shape)
        # 0 where the error is the least, for the bits of floats that are not negative are ordered as they are.
        key = (errors.view(torch.int32) - errors.amin(0).view(torch.int32)).clamp_(max=1)
        rank = torch.arange(len(candidates), dtype=torch.int32)[:, None]
        return key.mul_(_WINDOW).add_(rank).mul_(256).add_(candidates).amin(0).bitwise_and_(0xFF)


def _amax(magnitude: Tensor) -> Tensor:
    """int16 [blocks, 16] -> [blocks]."""
    for half in (8, 4, 2, 1):  # 3 times as fast as amax(-1)
        magnitude = torch.maximum(magnitude[:, :half], magnitude[:, half:])
    return magnitude[:, 0]


def _smallest(magnitude: Tensor) -> int:
    """The least magnitude above zero; 1 if there is none."""
    least = int(magnitude.amin())
    if least == 0:
        magnitude = magnitude[magnitude > 0]
        least = int(magnitude.amin()) if len(magnitude) else 1
    return least
