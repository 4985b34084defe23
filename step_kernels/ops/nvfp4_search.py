"""Weights to NVFP4 by a search of their block scales, and what that loses; the arithmetic is nvfp4.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nvfp4
from ..registry import Kernel, define, expect, lazy
from .swiglu import FLOATS


def _check(x, global_scale, search):
    expect("x", x, (..., None), FLOATS)
    expect("global_scale", global_scale, (), torch.float32)
    if x.shape[-1] % nvfp4.BLOCK:
        raise ValueError(f"x: got last dimension {x.shape[-1]}, wanted a multiple of {nvfp4.BLOCK}")
    if search not in nvfp4.SEARCHES:
        raise ValueError(f"search: got {search!r}, wanted one of {', '.join(nvfp4.SEARCHES)}")


def _fake(x, global_scale, search):
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty(*lead, k // 2, dtype=torch.uint8),
        x.new_empty(*lead, k // nvfp4.BLOCK, dtype=torch.float8_e4m3fn),
    )


def _cuda_refuses(x, global_scale, search):
    from ..cuda.nvfp4_search import refuse

    return refuse(x)


@define(
    check=_check,
    fake=_fake,
    kernels=(Kernel("cuda", lazy("cuda.nvfp4_search.launch"), package="cuda.bindings", refuse=_cuda_refuses),),
)
def nvfp4_search(x: Tensor, global_scale: Tensor, search: str) -> tuple[Tensor, Tensor]:
    """[..., k] float, f32 [], one of nvfp4.SEARCHES -> codes u8 [..., k/2], block scales e4m3 [..., k/16].

    The bits of nvfp4.search_scales and nvfp4.quantize, on every device. A weight's global_scale: nvfp4.global_scale.
    """
    x = x.contiguous()
    return nvfp4.quantize(x, global_scale, nvfp4.search_scales(x, global_scale, search))


def _check_error(x, codes, scales, global_scale):
    expect("x", x, (..., None), FLOATS)
    if x.shape[-1] % nvfp4.BLOCK:
        raise ValueError(f"x: got last dimension {x.shape[-1]}, wanted a multiple of {nvfp4.BLOCK}")
    expect("codes", codes, (*x.shape[:-1], x.shape[-1] // 2), torch.uint8)
    expect("scales", scales, (*x.shape[:-1], x.shape[-1] // nvfp4.BLOCK), torch.float8_e4m3fn)
    expect("global_scale", global_scale, (), torch.float32)


def _cuda_refuses_error(x, codes, scales, global_scale):
    return _cuda_refuses(x, global_scale, None)


@define(
    check=_check_error,
    fake=lambda x, codes, scales, global_scale: x.new_empty(2, dtype=torch.float64),
    kernels=(
        Kernel("cuda", lazy("cuda.nvfp4_search.launch_error"), package="cuda.bindings", refuse=_cuda_refuses_error),
    ),
)
def nvfp4_error(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """[..., k] float, u8 [..., k/2], e4m3 [..., k/16], f32 [] -> f64 [2]: sum((decoded - x)^2), sum(x^2).

    Differences and squares in f32, their sums in f64; the order of the sum is the kernel's, the same in every run.
    """
    x = x.float()
    difference = nvfp4.dequantize(codes, scales, global_scale) - x
    return torch.stack([t.square().sum(dtype=torch.float64) for t in (difference, x)])
