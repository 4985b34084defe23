"""Weights to NVFP4 by each search, at sizes that the converter works on: an expert's gate, a linear, eight experts."""

from __future__ import annotations

import torch

import step_kernels as sk
from step_kernels import nvfp4

PEERS = {"nvidia-modelopt": "modelopt.torch.kernels.quantization.gemm.nvfp4_fp8_sweep"}
CASES = {
    f"{search} {n}x{k}": (search, n, k)
    for search in nvfp4.SEARCHES
    for n, k in ((1280, 4096), (16384, 4096), (8 * 2560, 4096))
}


def inputs(case: tuple[str, int, int]) -> tuple:
    """The op's arguments: Gaussian weights and their own global scale."""
    search, n, k = case
    x = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    return x, nvfp4.global_scale(x.abs().amax().float(), search), search


def work(case: tuple[str, int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: 2 a weight read; half a byte and a 16th of a scale written."""
    _, n, k = case
    return n * (2 * k + k // 2 + k // 16), 0


def contenders() -> dict:
    """The op, and its specification."""
    return {"ours": sk.nvfp4_search, "torch": sk.nvfp4_search.reference}


def peers(case: tuple[str, int, int], x: torch.Tensor, global_scale: torch.Tensor, search: str) -> dict:
    """modelopt's sweep over all 126 scales, without codes."""

    def sweep():
        from modelopt.torch.kernels.quantization.gemm.nvfp4_fp8_sweep import nvfp4_fp8_scale_sweep

        return nvfp4_fp8_scale_sweep, (x, global_scale * (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX))

    return {"modelopt": sweep} if search == "mse" else {}


def error(x, global_scale, search) -> float:
    """0 if every code and scale is the reference's, else inf."""
    pairs = zip(*(op(x, global_scale, search) for op in (sk.nvfp4_search, sk.nvfp4_search.reference)))
    same = all(torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) for got, wanted in pairs)
    return 0.0 if same else float("inf")
