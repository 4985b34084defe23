"""Step's router: sigmoid scores, a bias for selection only, top-k, renormalised and scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, define, expect, lazy


def _check(logits, bias, top_k, scale):
    expect("logits", logits, (None, None), torch.float32)
    expect("bias", bias, (logits.shape[1],), torch.float32)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: got {top_k}, wanted 1 to {logits.shape[1]} (the number of experts)")


def _fake(logits, bias, top_k, scale):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _cuda_refuses(logits, bias, top_k, scale):
    from ..cuda.moe_topk import refuse

    return refuse(logits.shape[1], top_k)


def _triton_refuses(logits, bias, top_k, scale):
    from ..triton.moe_topk import MAX_EXPERTS

    if logits.shape[1] > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, got {logits.shape[1]}"


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel("cuda", lazy("cuda.moe_topk.launch"), package="cuda.bindings", refuse=_cuda_refuses),
        Kernel("triton", lazy("triton.moe_topk.launch"), package="triton", refuse=_triton_refuses),
    ),
)
def moe_topk(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """f32 [tokens, experts], f32 [experts] -> weights f32 [tokens, top_k], ids i32 [tokens, top_k].

    Scores are p = sigmoid(logits); the top_k of p + bias are selected, best first, ties by lower id, NaN
    last; a weight is p (without bias) over the selected sum, times `scale`. The formula: MoE gate of the
    Step-3.7-Flash release, all in f32.
    """
    scores = logits.sigmoid()
    ranked = (scores + bias).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ids = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale
    return weights, ids.int()
