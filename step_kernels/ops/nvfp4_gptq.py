"""Rounding to NVFP4 with a view to the outputs: a block's scale and codes by what they leave of a quadratic loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import nvfp4
from ..nvfp4 import BLOCK
from ..registry import Kernel, define, expect, lazy

# From the code of amax / 6 to the best code; with all 126 codes an output gains 0.05 dB at most.
OFFSETS = tuple(range(-4, 8))
# Numbers that all candidates for a block of some rows take: 4 MB on a CPU, near its cache, and 64 on a GPU.
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}


def _check(w, factor, products, errors, scales):
    expect("w", w, (..., None, None), torch.float32)
    *lead, n, k = w.shape
    if k % BLOCK:
        raise ValueError(f"w: got last dimension {k}, wanted a multiple of {BLOCK}")
    expect("factor", factor, (*lead, k, k), torch.float32)
    for name, tensor in (("products", products), ("errors", errors)):
        expect(name, tensor, (*lead, n, k), torch.float32)
    expect("scales", scales, (*lead, n, k // BLOCK), torch.uint8)


@define(
    check=_check,
    fake=lambda *args: None,
    kernels=(
        Kernel(
            "cuda",
            lazy("cuda.nvfp4_gptq.launch"),
            package="cuda.bindings",
            refuse=lazy("cuda.nvfp4_gptq.refuse"),
        ),
    ),
    mutates=("errors", "scales"),
)
def nvfp4_gptq(w: Tensor, factor: Tensor, products: Tensor, errors: Tensor, scales: Tensor) -> None:
    """Rounds blocks of 16 columns one after the other, each to what leaves the least of a quadratic loss, in place.

    w f32 [..., n, k] in units of the global scale; products f32 [..., n, k]; factor f32 [..., k, k], whose 16 x 16
    blocks T on the diagonal are lower triangular; what lies above them is not read. Changes errors f32 [..., n, k], so
    that w + errors are the rounded values, and scales u8 [..., n, k/16], e4m3 codes, 0 where there is none yet.

    A block's loss is |products|^2. A change d of its errors adds d T^T to its products, and d times the factor's rows
    behind to those of the blocks behind. From where its loss is least the block's columns are rounded one by one, what
    a column errs by being taken from those behind it (arXiv 2210.17323). Of the scales OFFSETS around that of amax / 6
    the first with the least loss is taken, if that is less than before or there was none.
    """
    step = max(1, _AT_ONCE[w.device.type] // (len(OFFSETS) * BLOCK * max(1, math.prod(w.shape[:-2]))))
    for rows in zip(*(t.split(step, -2) for t in (w, products, errors, scales))):
        _some_rows(factor, *rows)


def _some_rows(factor: Tensor, w: Tensor, products: Tensor, errors: Tensor, scales: Tensor) -> None:
    products = products.clone()
    for i in range(scales.shape[-1]):
        block, behind = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * (i + 1), None)
        upper = factor[..., block, block].mT
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        inverse = 1 / diagonal
        upper = upper * inverse[..., None, :]  # of ones on the diagonal
        before, after = products[..., block], w[..., block] + errors[..., block]
        move = before * inverse[..., None, :]
        for j in range(BLOCK - 1):
            move[..., j + 1 :] -= move[..., j, None] * upper[..., None, j, j + 1 :]
        code, values, loss = _rounded(after - move, upper, diagonal)
        better = (scales[..., i] == 0) | (loss < _sum(before.square()))
        change = torch.where(better[..., None], values - after, 0.0)
        products[..., behind] += change @ factor[..., behind, block].mT
        errors[..., block] = torch.where(better[..., None], values - w[..., block], errors[..., block])
        scales[..., i] = torch.where(better, code.to(torch.uint8), scales[..., i])


def _rounded(wanted: Tensor, upper: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., n, 16] -> the best scale's code [..., n], the values it gives [..., n, 16] and their loss [..., n]."""
    amax = wanted.abs().amax(-1)
    first = nvfp4.candidate_scales(amax, torch.ones_like(amax), "max")[0].view(torch.uint8).int()
    code = torch.stack([first + offset for offset in sorted(OFFSETS, key=abs)]).clamp_(1, 0x7E)
    scale = code.to(torch.uint8).view(torch.float8_e4m3fn).float()
    values, loss = wanted.expand(len(code), *wanted.shape).clone(), torch.zeros_like(scale)
    for j in range(BLOCK):
        value = nvfp4.e2m1_round(values[..., j] / scale).mul_(scale)
        loss += ((values[..., j] - value) * diagonal[..., None, j]).square()
        values[..., j + 1 :] += (wanted[..., j] - value)[..., None] * upper[..., None, j, j + 1 :]
        values[..., j] = value
    best = loss.argmin(0, keepdim=True)
    chosen = values.gather(0, best[..., None].expand(1, *wanted.shape))
    return code.gather(0, best)[0], chosen[0], loss.gather(0, best)[0]


def _sum(x: Tensor) -> Tensor:
    total = x[..., 0]
    for j in range(1, BLOCK):  # one after the other on every device
        total = total + x[..., j]
    return total
