"""x times an NVFP4 weight at the shapes of Step-3.7-Flash: q, o, k, the dense MLP, the share expert, the vocabulary."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from step_kernels.model.formats import kernel_layout
from step_kernels.nvfp4 import NVFP4Weight
from step_kernels.ops.nvfp4_linear import _nvfp4_linear

PEERS = {"torch": "torch", "triton": "triton", "humming-kernels": ".peer_humming"}
# Weights of 297, 28, 28, 26, 19, 9.4, 2.9 and 2.4 MB.
TOKENS = {
    (128896, 4096): (1, 2, 4, 8, 16, 64),
    (12288, 4096): (1, 8),
    (4096, 12288): (1, 8, 16, 64, 256, 1024, 8192),
    (11264, 4096): (1, 8),
    (8192, 4096): (1, 4, 8, 16, 32, 64, 128, 256, 1024, 8192),
    (4096, 4096): (1, 2, 8),
    (4096, 1280): (1, 8, 16, 64, 256, 1024, 8192),
    (1024, 4096): (1, 16),
}
CASES = {f"{m}: {n}x{k}": (m, n, k) for (n, k), tokens in TOKENS.items() for m in tokens}


def random_weight(*shape: int, outer: tuple[int, ...] = ()) -> NVFP4Weight:
    """[..., n, k] in checkpoint layout: uniform codes, block scales of 1 to 1.875, one global scale of shape `outer`
    that keeps products near 1."""
    *lead, n, k = shape
    codes = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(0x38, 0x40, (*lead, n, k // 16), dtype=torch.uint8, device="cuda")
    scale = torch.full(outer, k**-0.5 / (2.93 * 1.46), device="cuda")  # the rms of codes, and of scales
    return NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), scale)


def fields(weight) -> tuple[torch.Tensor, ...]:
    """A weight as the ops take it."""
    return weight.codes, weight.scales, weight.global_scale


def humming():
    """The module that calls humming-kernels; ImportError where it is not installed."""
    from . import peer_humming

    return peer_humming


@lru_cache(1)
def _weight(n: int, k: int) -> NVFP4Weight:
    return random_weight(n, k)


def inputs(case: tuple[int, int, int]) -> tuple:
    """The op's arguments; the weight in the prepared layout where this GPU has one."""
    m, n, k = case
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return x, *fields(kernel_layout(_weight(n, k), x.device, x.dtype))


def work(case: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: codes, a scale for 16 of them, x and the output in bf16."""
    m, n, k = case
    return n * k // 2 + n * k // 16 + 2 * m * (n + k), 2 * m * n * k


def contenders() -> dict:
    """The op; its peers have weights of their own."""
    return {"ours": _nvfp4_linear}


def peers(case: tuple[int, int, int], x: torch.Tensor, *weight) -> dict:
    """Who, and what prepares call and arguments; of the same weight, for Triton in checkpoint layout."""
    raw = _weight(*case[1:])
    return {
        "cuBLAS bf16": lambda: (F.linear, (x, raw.dequantize(torch.bfloat16))),
        "triton": lambda: (_nvfp4_linear, (x, *fields(raw))),
        "humming": lambda: humming().linear(x, raw),
    }


def compile_peers() -> None:
    """Compile humming's kernels, all at once."""
    humming().compile_ahead((m, n, k, 0) for m, n, k in CASES.values())


def exact(case: tuple[int, int, int], x: torch.Tensor, *weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to 32 of x's rows, and their product in float64."""
    rows = torch.linspace(0, len(x) - 1, min(32, len(x)), device=x.device).long()
    return rows, _nvfp4_linear.reference(x[rows].double(), *fields(_weight(*case[1:])))
