"""Launcher of csrc/smxx_swiglu.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .driver import Kernel
from .rms_norm import aligned

KERNEL = Kernel("smxx_swiglu", "smxx_swiglu", "PPqiif", dependent=True)
THREADS = 256
MOST_OUTPUTS = 2**34  # eight of which a 31-bit integer counts


def refuse(gate_up: Tensor, limit: float | None = None) -> str | None:
    """Why the kernel does not take the op's arguments, or None."""
    if gate_up.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(gate_up.dtype).removeprefix('torch.')}"
    if gate_up.shape[-1] % 16:
        return f"takes a multiple of 8 outputs a row, got {gate_up.shape[-1] // 2}"
    if gate_up.numel() >= 2 * MOST_OUTPUTS:
        return f"takes fewer than {MOST_OUTPUTS} outputs, got {gate_up.numel() // 2}"


def launch(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """bf16 [..., 2n] with any strides -> [..., n], contiguous."""
    n = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], n)
    if out.numel() == 0:
        return out
    rows, chunks = aligned(gate_up.reshape(-1, 2 * n)), out.numel() // 8
    limit = math.inf if limit is None else limit
    KERNEL.launch((-(-chunks // THREADS), 1, 1), THREADS, rows, out, rows.stride(0), chunks, n // 8, limit)
    return out
