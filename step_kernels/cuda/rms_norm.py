"""Launchers of csrc/smxx_rms_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import Kernel, multiprocessors

LEAST, MOST = 1024, 16384  # elements of a row; a block a row is too much for short ones, registers end at long ones
_FETCHED_AHEAD = 4096  # up to which a block has 8 elements a thread and its next row on the way
BLOCKS = 2  # on a multiprocessor then
_WEIGHTS = {torch.bfloat16: "bf16", torch.float32: "f32"}
VARIANTS = {
    (dtype, terms, chunks): Kernel(
        "smxx_rms_norm", f"smxx_rms_norm_{name}_{terms}_{chunks}", "PPPqqqPPPiif", dependent=True
    )
    for dtype, name in _WEIGHTS.items()
    for terms in (1, 2, 3)
    for chunks in (1, 4)
}


def refuse(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take such rows, or None."""
    n = x.shape[-1]
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got x in {str(x.dtype).removeprefix('torch.')}"
    if weight.dtype not in _WEIGHTS:
        return f"takes weights in bfloat16 and float32, got {str(weight.dtype).removeprefix('torch.')}"
    if n % 8 or not LEAST <= n <= MOST:
        return f"takes rows of {LEAST} to {MOST}, a multiple of 8, got {n}"


def launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """bf16 [..., n] with any strides, bf16 or f32 [n] -> bf16 [..., n], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run((x,), weight, eps, out, out)
    return out


def launch_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None):
    """bf16 [..., n] with any strides, two or three times, [n] -> norm of the sum, the sum; contiguous."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _run((x, residual) if other is None else (x, residual, other), weight, eps, out, total)
    return out, total


def _run(terms: tuple[Tensor, ...], weight: Tensor, eps: float, out: Tensor, total: Tensor) -> None:
    if out.numel() == 0:
        return
    count, n = len(terms), out.shape[-1]
    terms = [aligned(term.reshape(-1, n)) for term in terms]
    terms += [terms[0]] * (3 - count)  # which the kernel leaves alone
    rows, chunks = terms[0].shape[0], 1 if n <= _FETCHED_AHEAD else 4
    blocks = rows
    if chunks == 1:
        most = BLOCKS * multiprocessors(out.device.index)
        blocks = -(-rows // -(-rows // most))  # each with as many rows as the others, or one fewer
    arguments = (*terms, *(term.stride(0) for term in terms), aligned(weight), out, total, rows, n, eps)
    VARIANTS[weight.dtype, count, chunks].launch((blocks, 1, 1), 32 * -(-n // (256 * chunks)), *arguments)


def aligned(x: Tensor) -> Tensor:
    """x [n] or [rows, n] with a multiple of 16 bytes before every row; a copy where its rows lie otherwise."""
    in_place = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and (x.dim() == 1 or x.stride(0) % 8 == 0)
    return x if in_place else x.clone(memory_format=torch.contiguous_format)
