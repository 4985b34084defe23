"""Activations to NVFP4 at the widths of Step-3.7-Flash: hidden size 4096, 1280 inside an expert."""

from __future__ import annotations

import torch

import step_kernels as sk

CASES = {f"{tokens} x {k}": (tokens, k) for k in (1280, 4096) for tokens in (1, 64, 1024, 8192)}


def inputs(case: tuple[int, int]) -> tuple:
    """The op's arguments, random."""
    return torch.randn(*case, device="cuda", dtype=torch.bfloat16), torch.tensor(0.002, device="cuda")


def work(case: tuple[int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: 2 a value read; half a byte and a 16th of a scale written."""
    tokens, k = case
    return tokens * (2 * k + k // 2 + k // 16), 0


def contenders() -> dict:
    """The op first, then its peers."""
    reference = sk.nvfp4_quantize.reference
    return {"ours": sk.nvfp4_quantize, "torch": reference, "torch.compile": torch.compile(reference)}


def error(x, global_scale) -> float:
    """0 if every code and scale is the reference's, else inf."""
    pairs = zip(sk.nvfp4_quantize(x, global_scale), sk.nvfp4_quantize.reference(x, global_scale))
    same = all(torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) for got, wanted in pairs)
    return 0.0 if same else float("inf")
