"""Step's router from hidden states on: logits in f32, then what moe_topk makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, define, expect, lazy
from .moe_topk import moe_topk
from .swiglu import FLOATS

_triton_topk = lazy("triton.moe_topk.launch")


def _check(x, weight, bias, top_k, scale):
    expect("x", x, (None, None), FLOATS)
    expect("weight", weight, (None, x.shape[1]), torch.float32)
    expect("bias", bias, (weight.shape[0],), torch.float32)
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k: got {top_k}, wanted 1 to {weight.shape[0]} (the number of experts)")


def _fake(x, weight, bias, top_k, scale):
    shape = (x.shape[0], top_k)
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.int32)


def _cuda_refuses(x, weight, bias, top_k, scale):
    from ..cuda.moe_topk import refuse

    return refuse(weight.shape[0], top_k)


def _triton_refuses(x, weight, bias, top_k, scale):
    from ..triton.moe_topk import MAX_EXPERTS

    if weight.shape[0] > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, got {weight.shape[0]}"


def _triton(x, weight, bias, top_k, scale):
    return _triton_topk(_logits(x, weight), bias, top_k, scale)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.mT


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel("cuda", lazy("cuda.moe_router.launch"), (90, 129), "cuda.bindings", _cuda_refuses),
        Kernel("cuda", lazy("cuda.moe_router.launch_apart"), (80, 89), "cuda.bindings", _cuda_refuses),
        Kernel("triton", _triton, package="triton", refuse=_triton_refuses),
    ),
)
def moe_router(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """[tokens, hidden], f32 [experts, hidden], f32 [experts] -> weights f32 [tokens, top_k], ids i32 [tokens, top_k].

    moe_topk(x @ weight.T, bias, top_k, scale), the logits summed in f32: in bf16 they would change which experts are
    chosen. How they are summed is the kernel's; for an infinite x it may make NaN of them.
    """
    return moe_topk.reference(_logits(x, weight), bias, top_k, scale)
