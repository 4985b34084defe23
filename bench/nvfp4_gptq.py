"""Blocks rounded by what they leave of a loss: 128 columns of eight experts, gate and up or down; all of one."""

from __future__ import annotations

import torch

import step_kernels as sk

CASES = {
    "128 columns, 8 x 2560": (8, 2560, 128),
    "128 columns, 8 x 4096": (8, 4096, 128),
    "16 columns, 256 x 2560": (256, 2560, 16),
}


def inputs(case: tuple[int, int, int]) -> tuple:
    """The op's arguments: Gaussian weights, inputs of uneven size that lean on their neighbours."""
    matrices, n, k = case
    w = torch.randn(matrices, n, k, device="cuda") * 100
    x = torch.randn(4 * k, k, device="cuda") * torch.exp(0.8 * torch.randn(k, device="cuda"))
    x = x + 0.5 * x.roll(1, 1)
    factor = torch.linalg.cholesky((x.mT @ x).flip(-2, -1)).flip(-2, -1).mT.repeat(matrices, 1, 1)
    scales = torch.zeros(matrices, n, k // 16, dtype=torch.uint8, device="cuda")
    return w, factor, torch.zeros_like(w), torch.zeros_like(w), scales


def work(case: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: weights, products and errors read, errors written; scales both."""
    matrices, n, k = case
    return matrices * (n * (16 * k + k // 8) + 4 * k * k), 0


def contenders() -> dict:
    """The op, and its specification."""
    return {"ours": sk.nvfp4_gptq, "torch": sk.nvfp4_gptq.reference}


def error(w, factor, products, errors, scales) -> float:
    """The share of blocks that get another scale than the specification's, of those from no scales on."""
    found = []
    for op in contenders().values():
        begun = torch.zeros_like(errors), torch.zeros_like(scales)
        op(w, factor, products, *begun)
        found.append(begun[1])
    return float((found[0] != found[1]).float().mean())
