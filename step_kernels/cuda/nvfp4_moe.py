"""nvfp4_moe with experts in the prepared layout (prepared.py), gate and up rows paired: csrc/sm90_nvfp4_moe.cu or, for
many tokens, sm90_nvfp4_moe_prefill.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import nvfp4_prefill
from .driver import Kernel, multiprocessors
from .nvfp4_linear import BLOCKS, SHARED_BYTES, THREADS, partials, rows, variant

MOST_PAIRS = 256  # (token, slot) pairs to decode, which each block sorts: 32 tokens of 8 experts
MOST_EXPERTS = 512
FEW_TOKENS, FEW_PAIRS = 2, 32  # whose columns fit beside all of k, and which one warp sorts
GATE_UP, DOWN = (
    {
        t: Kernel("sm90_nvfp4_moe", f"sm90_nvfp4_moe_{part}_t{t}", types, SHARED_BYTES[t], dependent=True)
        for t in THREADS
    }
    for part, types in (("gate_up", "PPPPPPPqiiiiiifPP"), ("down", "PPPPPPPPiiii"))
)
GATE_UP_FEW, DOWN_FEW = (
    Kernel("sm90_nvfp4_moe", f"sm90_nvfp4_moe_{part}_few", types, SHARED_BYTES[2], dependent=True)
    for part, types in (("gate_up", "PPPPPPPqiiiiiifPP"), ("down", "PPPPPPPPiiiii"))
)
SUM = Kernel("sm90_nvfp4_moe", "sm90_nvfp4_moe_sum", "PPPiii", dependent=True)


def refuse(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_global: Tensor,
    *rest,
) -> str | None:  # fmt: skip
    """Why the kernels do not take the op's arguments, or None."""
    if gate_up_scales.dtype != torch.uint8:
        return "takes prepared experts, got some in checkpoint layout"
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if gate_up_codes.shape[0] > MOST_EXPERTS:
        return f"takes at most {MOST_EXPERTS} experts, got {gate_up_codes.shape[0]}"


def launch(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_global: Tensor,
    down_codes: Tensor, down_scales: Tensor, down_global: Tensor, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """The op's arguments, x bf16 -> [tokens, hidden], contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0 or ids.numel() == 0 or gate_up_codes.numel() == 0:
        return out.zero_()
    (tokens, hidden), top_k, (experts, row_blocks) = x.shape, ids.shape[1], gate_up_codes.shape[:2]
    x, ids, weights = rows(x), ids.contiguous(), weights.contiguous()
    pairs, inner_size = ids.numel(), 32 * row_blocks
    gate_up = gate_up_codes.contiguous(), gate_up_scales.contiguous(), gate_up_global.contiguous()
    down = down_codes.contiguous(), down_scales.contiguous(), down_global.contiguous()
    if pairs > MOST_PAIRS:
        return nvfp4_prefill.moe(x, weights, ids, gate_up, down, inner_size, limit)
    few = tokens <= FEW_TOKENS and pairs <= FEW_PAIRS
    shared = tile(tokens, pairs, experts)
    grid, partial = (BLOCKS[shared] * multiprocessors(x.device.index), 1, 1), partials(x.device)
    inner = x.new_empty(pairs, inner_size)
    arguments = (
        *gate_up, x, ids, inner, partial, x.stride(0), pairs, top_k, experts, row_blocks, hidden,
        gate_up_global.dim(), float("inf") if limit is None else limit, *down[:2],
    )  # fmt: skip
    if few:
        GATE_UP_FEW.launch(grid, THREADS[shared], *arguments)
        sizes = (pairs, top_k, experts, hidden, inner_size)
        DOWN_FEW.launch(grid, THREADS[shared], *down, inner, ids, weights, out, partial, *sizes)
        return out
    GATE_UP[shared].launch(grid, THREADS[shared], *arguments)
    parts = x.new_empty(pairs, hidden, dtype=torch.float32)
    sizes = (pairs, experts, hidden, inner_size)
    DOWN[shared].launch(grid, THREADS[shared], *down, inner, ids, weights, parts, partial, *sizes)
    SUM.launch((-(-hidden // 1024), tokens, 1), 256, parts, ids, out, top_k, experts, hidden)
    return out


def tile(tokens: int, pairs: int, experts: int) -> int:
    """How many tokens share a read of an expert: more cost instructions, fewer read popular experts again.

    Tuned on a model whose tokens choose alike: of 288 experts 16 of its tokens choose 82, not 105, and 4 tokens a read
    make a step 3 % shorter than 2; from 33 tokens on (64 choose 171) the prefill kernels make it 6 % shorter.
    """
    return min(variant(tokens), 2 if pairs <= 0.3 * experts else 4 if pairs <= 2 * experts else 8)
