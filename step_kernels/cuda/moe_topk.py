"""Launcher of csrc/smxx_moe_topk.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import Kernel

# By the most experts a variant takes: a lane keeps a 32nd of them in registers.
VARIANTS = {n: Kernel("smxx_moe_topk", f"smxx_moe_topk_e{n}", "PPPPqiiif") for n in (128, 256, 288, 512)}
MAX_EXPERTS = max(VARIANTS)
MAX_TOP_K = 32  # lane j writes the j-th choice
TOKENS_PER_BLOCK = 4  # a warp each; the kernel's kWarpsPerBlock


def refuse(experts: int, top_k: int) -> str | None:
    """Why the kernel does not take so many, or None."""
    if experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        return f"takes at most {MAX_EXPERTS} experts and top {MAX_TOP_K}, got {experts} and {top_k}"


def launch(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """f32 [tokens, experts], f32 [experts] -> weights f32 [tokens, top_k], ids i32 [tokens, top_k]."""
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    if tokens == 0:
        return weights, ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    kernel = VARIANTS[min(n for n in VARIANTS if n >= experts)]
    grid = ((tokens + TOKENS_PER_BLOCK - 1) // TOKENS_PER_BLOCK, 1, 1)
    arguments = (logits, bias.contiguous(), weights, ids, logits.stride(0), tokens, experts, top_k, scale)
    kernel.launch(grid, 32 * TOKENS_PER_BLOCK, *arguments)
    return weights, ids
