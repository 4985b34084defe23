"""x times the transpose of an NVFP4 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nvfp4 import BLOCK, NVFP4Weight
from ..registry import Kernel, define, expect
from .swiglu import FLOATS


def _check(x, codes, scales, global_scale):
    expect("weight.codes", codes, (None, None), torch.uint8)
    n, k = codes.shape[0], codes.shape[1] * 2
    if k % BLOCK:
        raise ValueError(f"weight.codes: got k = {k}, wanted a multiple of {BLOCK}")
    expect("weight.scales", scales, (n, k // BLOCK), torch.float8_e4m3fn)
    expect("weight.global_scale", global_scale, (...,), torch.float32)
    if global_scale.dim() > 1 or (global_scale.dim() == 1 and (not len(global_scale) or n % len(global_scale))):
        got = list(global_scale.shape)
        raise ValueError(f"weight.global_scale: got shape {got}, wanted [] or [parts] with parts dividing n = {n}")
    expect("x", x, (..., k), FLOATS)


def _fake(x, codes, scales, global_scale):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _triton(*args):
    from ..triton.nvfp4_linear import launch

    return launch(*args)


def _triton_refuses(x, *args):
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


@define(check=_check, fake=_fake, kernels=(Kernel("triton", _triton, package="triton", refuse=_triton_refuses),))
def _nvfp4_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = NVFP4Weight(codes, scales, global_scale).dequantize(compute)
    return (x.to(compute) @ weight.mT).to(x.dtype)


def nvfp4_linear(x: Tensor, weight: NVFP4Weight) -> Tensor:
    """[..., k] float, NVFP4Weight [n, k] -> [..., n] of x's dtype, summed in f32 (f64 for a float64 x)."""
    return _nvfp4_linear(x, weight.codes, weight.scales, weight.global_scale)
