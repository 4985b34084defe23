"""x times the transpose of an NVFP4 weight."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import prepared
from ..nvfp4 import BLOCK, NVFP4Weight
from ..prepared import TILE, PreparedWeight
from ..registry import Kernel, define, expect, lazy
from .swiglu import FLOATS


def _check(x, codes, scales, global_scale, n=None):
    if is_prepared(scales):
        k = x.shape[-1]
        expect("weight.codes", codes, (None, -(-k // TILE), 2048), torch.uint8)
        expect("weight.scales", scales, (*codes.shape[:2], 256), torch.uint8)
        rows = TILE * codes.shape[0]
        n = rows if n is None else n
        if k % BLOCK or not rows - TILE < n <= rows:
            raise ValueError(f"weight: got a prepared [{n}, {k}] of {rows} rows, wanted k a multiple of {BLOCK}")
    else:
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


def _fake(x, codes, scales, global_scale, n=None):
    rows = TILE * codes.shape[0] if is_prepared(scales) else codes.shape[0]
    return x.new_empty(*x.shape[:-1], rows if n is None else n)


def is_prepared(scales: Tensor) -> bool:
    """Whether the weight with these block scales is in the prepared layout, by their type and tiles."""
    return scales.dtype == torch.uint8 and scales.dim() > 2


def in_checkpoint_layout(kernel: Kernel, scales: int, count: int) -> Kernel:
    """The row of a kernel that takes the op's first `count` arguments; argument `scales` tells the layout."""

    def refuse(*args):
        if is_prepared(args[scales]):
            return "takes a weight in checkpoint layout, got a prepared one"
        return kernel.refuse(*args[:count]) if kernel.refuse else None

    return dataclasses.replace(kernel, launch=lambda *args: kernel.launch(*args[:count]), refuse=refuse)


def _triton_refuses(x, *args):
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


# sm_110 lies between FlashInfer's ranges and is in neither.
_DATACENTER, _RTX = (100, 103), (120, 121)
_W4A4 = lazy("flashinfer.nvfp4_linear.launch_w4a4"), "flashinfer", lazy("flashinfer.nvfp4_linear.refuse_w4a4")
_W4A16 = lazy("flashinfer.nvfp4_linear.launch"), "flashinfer", lazy("flashinfer.nvfp4_linear.refuse")
_CHECKPOINT_LAYOUT = (
    Kernel("flashinfer-w4a4", _W4A4[0], _DATACENTER, *_W4A4[1:]),
    Kernel("flashinfer-w4a4", _W4A4[0], _RTX, *_W4A4[1:]),
    Kernel("triton-w4a4", lazy("triton.nvfp4_w4a4.launch"), (100, 121), "triton", lazy("triton.nvfp4_w4a4.refuse")),
    Kernel("flashinfer", _W4A16[0], _DATACENTER, *_W4A16[1:]),
    Kernel("flashinfer", _W4A16[0], _RTX, *_W4A16[1:]),
    Kernel("triton", lazy("triton.nvfp4_linear.launch"), package="triton", refuse=_triton_refuses),
)
_CUDA, _W4A8 = "cuda.nvfp4_linear", "cuda.nvfp4_w4a8"
_KERNELS = (
    Kernel("cuda-w4a8", lazy(f"{_W4A8}.launch_linear"), (90, 90), "cuda.bindings", lazy(f"{_W4A8}.refuse_linear")),
    Kernel("cuda", lazy(f"{_CUDA}.launch"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse")),
    *(in_checkpoint_layout(kernel, 2, 4) for kernel in _CHECKPOINT_LAYOUT),
)


@define(check=_check, fake=_fake, kernels=_KERNELS)
def _nvfp4_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int | None = None) -> Tensor:
    if is_prepared(scales):
        n = TILE * codes.shape[0] if n is None else n
        codes, scales = prepared.unpack(codes, scales, n, x.shape[-1], False)
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = NVFP4Weight(codes, scales, global_scale).dequantize(compute)
    return (x.to(compute) @ weight.mT).to(x.dtype)


def nvfp4_linear(x: Tensor, weight: NVFP4Weight | PreparedWeight) -> Tensor:
    """[..., k] float, a weight [n, k] -> [..., n] of x's dtype, summed in f32 (f64 for a float64 x)."""
    n = weight.shape[0] if isinstance(weight, PreparedWeight) else None
    return _nvfp4_linear(x, weight.codes, weight.scales, weight.global_scale, n)
