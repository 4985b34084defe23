"""Launchers of csrc/smxx_nvfp4_search.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nvfp4
from .driver import Kernel, multiprocessors

THREADS = {"max": 1024, "four-six": 768, "mse": 640}  # one thread block fills a multiprocessor
MOST_WEIGHTS = 2**34  # blocks of 16 fewer than 2^30, so that a step past the end stays below 2^32
_INPUTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
VARIANTS = {
    (dtype, search): Kernel("smxx_nvfp4_search", f"smxx_nvfp4_search_{name}_{search.replace('-', '_')}", "PPPPi")
    for dtype, name in _INPUTS.items()
    for search in nvfp4.SEARCHES
}
ERRORS = {
    dtype: Kernel("smxx_nvfp4_search", f"smxx_nvfp4_search_error_{name}", "PPPPPi") for dtype, name in _INPUTS.items()
}
ERROR_THREADS, ERROR_BLOCKS = 128, 4  # blocks of 16 a thread


def refuse(x: Tensor) -> str | None:
    """Why the kernel does not take such weights, or None."""
    if x.dtype not in _INPUTS:
        return f"takes bfloat16, float16 and float32, got {str(x.dtype).removeprefix('torch.')}"
    if x.numel() >= MOST_WEIGHTS:
        return f"takes fewer than {MOST_WEIGHTS} weights, got {x.numel()}"


def launch(x: Tensor, global_scale: Tensor, search: str) -> tuple[Tensor, Tensor]:
    """bf16, f16 or f32 [..., k] with any strides, f32 [] -> codes u8 [..., k/2], scales e4m3 [..., k/16]."""
    *lead, k = x.shape
    codes = x.new_empty(*lead, k // 2, dtype=torch.uint8)
    scales = x.new_empty(*lead, k // 16, dtype=torch.float8_e4m3fn)
    blocks = scales.numel()
    if blocks == 0:
        return codes, scales
    x = _aligned(x)
    grid = min(-(-blocks // 32), multiprocessors(x.device.index))
    VARIANTS[x.dtype, search].launch((grid, 1, 1), THREADS[search], x, global_scale, codes, scales, blocks)
    return codes, scales


def launch_error(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """As `launch` takes and gives them -> f64 [2]: squared error, squared size."""
    blocks = scales.numel()
    grid = -(-blocks // (ERROR_BLOCKS * ERROR_THREADS))
    sums = x.new_empty(grid, 2, dtype=torch.float64)
    if blocks:
        codes, scales = _aligned(codes), scales.contiguous()
        ERRORS[x.dtype].launch((grid, 1, 1), ERROR_THREADS, _aligned(x), global_scale, codes, scales, sums, blocks)
    return sums.sum(0)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy: contiguous, at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
