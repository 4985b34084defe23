"""MoE router: one program a token; top_k rounds of one maximum over keys that hold score and id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import sigmoid

MAX_EXPERTS = 1024  # a token's keys live in the registers of one program


@triton.jit
def _moe_topk_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, row_stride, experts, scale,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < experts
    score = sigmoid(tl.load(logits_ptr + token * row_stride + expert, mask=inside, other=0.0))
    rank = score + tl.load(bias_ptr + expert, mask=inside, other=0.0)
    # Integers in the order of the floats, NaN with -inf; below them the id's complement, so that a tie's lower
    # id is the larger key and no two keys are equal.
    bits = tl.where(rank != rank, float("-inf"), rank).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    struck_out = -0x8000000000000000
    key = tl.where(inside, (order.to(tl.int64) << 32) | (0x7FFFFFFF - expert), struck_out)
    choice = tl.arange(0, CHOICES)
    selected = tl.zeros([CHOICES], tl.int32)
    for i in range(TOP_K):
        best = tl.max(key, 0)
        selected = tl.where(choice == i, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), selected)
        key = tl.where(key == best, struck_out, key)
    chosen = choice < TOP_K
    score = sigmoid(tl.load(logits_ptr + token * row_stride + selected, mask=chosen, other=0.0))
    total = tl.sum(tl.where(chosen, score, 0.0), 0) + 1e-20
    at = token * TOP_K + choice
    tl.store(weights_ptr + at, tl.div_rn(score, total) * scale, mask=chosen)
    tl.store(ids_ptr + at, selected, mask=chosen)


def launch(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """f32 [tokens, experts], f32 [experts] -> weights f32 [tokens, top_k], ids i32 [tokens, top_k]."""
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    if tokens == 0:
        return weights, ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block, choices, warps = tile(experts, top_k)
    _moe_topk_kernel[(tokens,)](
        logits, bias.contiguous(), weights, ids, logits.stride(0), experts, scale, TOP_K=top_k,
        BLOCK=block, CHOICES=choices, num_warps=warps,
    )  # fmt: skip
    return weights, ids


def tile(experts: int, top_k: int) -> tuple[int, int, int]:
    """BLOCK, CHOICES and warps: 16 keys a lane at most, and up to 512 experts no maximum leaves its warp."""
    block = triton.next_power_of_2(experts)
    return block, triton.next_power_of_2(top_k), 1 if block <= 512 else 4


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    types = dict.fromkeys(("logits_ptr", "bias_ptr", "weights_ptr"), "*fp32") | {"ids_ptr": "*i32"}
    types |= dict.fromkeys(("row_stride", "experts"), "i32") | {"scale": "fp32"}
    for experts, top_k in ((288, 8), (1024, 32)):
        block, choices, warps = tile(experts, top_k)
        yield _moe_topk_kernel, types, {"TOP_K": top_k, "BLOCK": block, "CHOICES": choices}, warps
