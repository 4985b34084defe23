"""Step's RMS norm, alone and behind the additions that precede it in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, define, expect, lazy
from .swiglu import FLOATS


def _check(x, weight, eps):
    expect("x", x, (..., None), FLOATS)
    expect("weight", weight, (x.shape[-1],), FLOATS)


def _check_add(x, residual, weight, eps, other=None):
    _check(x, weight, eps)
    expect("residual", residual, tuple(x.shape), x.dtype)
    if other is not None:
        expect("other", other, tuple(x.shape), x.dtype)


def _fake(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add(x, residual, weight, eps, other=None):
    return _fake(x, weight, eps), _fake(x, weight, eps)


def _cuda_refuses(x, weight, eps):
    from ..cuda.rms_norm import refuse

    return refuse(x, weight)


def _cuda_add_refuses(x, residual, weight, eps, other=None):
    return _cuda_refuses(x, weight, eps)


def _triton_refuses(x, weight, eps):
    from ..triton.rms_norm import MAX_N

    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype == torch.float64:
            return f"takes bfloat16, float16 and float32, got {name} in float64"
    if x.shape[-1] > MAX_N:
        return f"takes rows of at most {MAX_N}, got {x.shape[-1]}"


def _triton_add_refuses(x, residual, weight, eps, other=None):
    return _triton_refuses(x, weight, eps)


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel("cuda", lazy("cuda.rms_norm.launch"), (90, 129), "cuda.bindings", _cuda_refuses),
        Kernel("triton", lazy("triton.rms_norm.launch"), package="triton", refuse=_triton_refuses),
    ),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., n], [n] -> like x: x / rms(x) * (1 + weight), in f32 (f64 for a float64 x), rounded once.

    The stored weight is the delta from 1, as in the Step-3.7-Flash release.
    """
    return normalized(x, weight, eps).to(x.dtype).contiguous()


@define(
    check=_check_add,
    fake=_fake_add,
    kernels=(
        Kernel("cuda", lazy("cuda.rms_norm.launch_add"), (90, 129), "cuda.bindings", _cuda_add_refuses),
        Kernel("triton", lazy("triton.rms_norm.launch_add"), package="triton", refuse=_triton_add_refuses),
    ),
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, residual and maybe other [..., n], weight [n] -> (rms_norm(total, weight, eps), total).

    total = (x + residual) + other, added in f32 (f64 for a float64 x), rounded once to x's dtype and before it is
    normed: what the next layer adds to is what this one read.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + residual.to(wide)
    total = (total if other is None else total + other.to(wide)).to(x.dtype).contiguous()
    return normalized(total, weight, eps).to(x.dtype), total


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) over the last dimension, returned in f32 (f64 for a float64 x)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight.to(x.dtype))
