"""x times the transpose of an NVFP4 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nvfp4 import BLOCK, NVFP4Weight
from ..registry import Kernel, define, expect, lazy
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


def _triton_refuses(x, *args):
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


# sm_110 lies between FlashInfer's ranges and is in neither.
_DATACENTER, _RTX = (100, 103), (120, 121)
_W4A4 = lazy("flashinfer.nvfp4_linear.launch_w4a4"), "flashinfer", lazy("flashinfer.nvfp4_linear.refuse_w4a4")
_W4A16 = lazy("flashinfer.nvfp4_linear.launch"), "flashinfer", lazy("flashinfer.nvfp4_linear.refuse")
_KERNELS = (
    Kernel("flashinfer-w4a4", _W4A4[0], _DATACENTER, *_W4A4[1:]),
    Kernel("flashinfer-w4a4", _W4A4[0], _RTX, *_W4A4[1:]),
    Kernel("triton-w4a4", lazy("triton.nvfp4_w4a4.launch"), (100, 121), "triton", lazy("triton.nvfp4_w4a4.refuse")),
    Kernel("flashinfer", _W4A16[0], _DATACENTER, *_W4A16[1:]),
    Kernel("flashinfer", _W4A16[0], _RTX, *_W4A16[1:]),
    Kernel("triton", lazy("triton.nvfp4_linear.launch"), package="triton", refuse=_triton_refuses),
)


@define(check=_check, fake=_fake, kernels=_KERNELS)
def _nvfp4_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = NVFP4Weight(codes, scales, global_scale).dequantize(compute)
    return (x.to(compute) @ weight.mT).to(x.dtype)


def nvfp4_linear(x: Tensor, weight: NVFP4Weight) -> Tensor:
    """[..., k] float, NVFP4Weight [n, k] -> [..., n] of x's dtype, summed in f32 (f64 for a float64 x)."""
    return _nvfp4_linear(x, weight.codes, weight.scales, weight.global_scale)
