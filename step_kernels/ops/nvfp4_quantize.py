"""Activations to NVFP4 and back; the arithmetic is nvfp4.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nvfp4
from ..registry import Kernel, define, expect
from .swiglu import FLOATS


def _check_quantize(x, global_scale):
    expect("x", x, (..., None), FLOATS)
    expect("global_scale", global_scale, (), torch.float32)
    if x.shape[-1] % nvfp4.BLOCK:
        raise ValueError(f"x: got last dimension {x.shape[-1]}, wanted a multiple of {nvfp4.BLOCK}")


def _fake_quantize(x, global_scale):
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty(*lead, k // 2, dtype=torch.uint8),
        x.new_empty(*lead, k // nvfp4.BLOCK, dtype=torch.float8_e4m3fn),
    )


def _triton_quantize(x, global_scale):
    from ..triton.nvfp4_quantize import quantize

    return quantize(x, global_scale)


def _triton_quantize_refuses(x, global_scale):
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


@define(
    check=_check_quantize,
    fake=_fake_quantize,
    kernels=(Kernel("triton", _triton_quantize, package="triton", refuse=_triton_quantize_refuses),),
)
def nvfp4_quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """[..., k] float, f32 [] -> codes u8 [..., k/2] (even k in the low nibble), scales e4m3 [..., k/16].

    Block scales by the `max` rule, e4m3(amax / (6 * global_scale)), a zero block's 1.
    """
    return nvfp4.quantize(x.contiguous(), global_scale)


def _check_dequantize(codes, scales, global_scale, dtype=torch.bfloat16):
    expect("codes", codes, (..., None), torch.uint8)
    if codes.shape[-1] * 2 % nvfp4.BLOCK:
        raise ValueError(f"codes: got last dimension {codes.shape[-1]}, wanted a multiple of {nvfp4.BLOCK // 2}")
    expect("scales", scales, (*codes.shape[:-1], codes.shape[-1] * 2 // nvfp4.BLOCK), torch.float8_e4m3fn)
    expect("global_scale", global_scale, (), torch.float32)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {str(dtype).removeprefix('torch.')}, wanted bfloat16, float16, float32 or float64")


def _fake_dequantize(codes, scales, global_scale, dtype=torch.bfloat16):
    return codes.new_empty(*codes.shape[:-1], codes.shape[-1] * 2, dtype=dtype)


def _triton_dequantize(codes, scales, global_scale, dtype=torch.bfloat16):
    from ..triton.nvfp4_quantize import dequantize

    return dequantize(codes, scales, global_scale, dtype)


def _triton_dequantize_refuses(codes, scales, global_scale, dtype=torch.bfloat16):
    if dtype == torch.float64:
        return "gives bfloat16, float16 and float32, got float64"


@define(
    check=_check_dequantize,
    fake=_fake_dequantize,
    kernels=(Kernel("triton", _triton_dequantize, package="triton", refuse=_triton_dequantize_refuses),),
)
def nvfp4_dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """u8 [..., k/2], e4m3 [..., k/16], f32 [] -> [..., k] of `dtype`: e2m1 * (scale * global_scale), rounded once."""
    return nvfp4.dequantize(codes, scales, global_scale, dtype)
