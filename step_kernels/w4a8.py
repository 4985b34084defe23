"""W4A8: activations and expanded weights in FP8 e4m3, for Hopper's FP8 tensor cores. Faster and less accurate, so only
on request.

On Gaussian data a linear's output moves by 3.4 % of its size, an expert's by 6.1 %; a linear's SQNR falls from 20.5 to
20.1 dB (`max` scales), from 21.9 to 21.2 dB (`mse`).
Kernels that do so refuse every call unless the environment has STEP_KERNELS_W4A8=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import nvfp4

_DEBT = 8.0  # brings the largest code times block scale, 2688, within e4m3's 448


def refuse() -> str | None:
    """Why a W4A8 kernel may not serve: nobody allowed it to round activations and weights to FP8."""
    if os.environ.get("STEP_KERNELS_W4A8") != "1":
        return "rounds activations and weights to FP8; STEP_KERNELS_W4A8=1 allows that"


def round_activations(x: Tensor) -> Tensor:
    """[..., k] float -> the same times e4m3's rounding, f32 (f64 for f64): a power of two a row brings it within 448.

    It is at least 2^-121. A row with an infinity or a NaN becomes NaN.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True)
    clamped = largest.clamp(min=nvfp4.E4M3_MAX * 2.0**-121)
    mantissa, _ = torch.frexp(clamped)
    # 448 is 0.875 * 2^9; the division is exact, as a power function need not be
    scale = clamped * torch.where(mantissa > 0.875, 2.0**-8, 2.0**-9) / mantissa
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def round_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """u8 [..., n, k/2], e4m3 [..., n, k/16] -> [..., n, k]: 8 times e4m3's rounding of code * block scale / 8."""
    exact = nvfp4.dequantize(codes, scales, torch.ones((), device=codes.device))
    return (exact / _DEBT).to(torch.float8_e4m3fn).to(dtype) * _DEBT


def nvfp4_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """The reference of W4A8 kernels: nvfp4_linear of both sides rounded to FP8, summed in f32 (f64 for f64)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    product = round_activations(x) @ round_weight(codes, scales, compute).mT
    outer = global_scale.to(compute)
    return (product * (outer.repeat_interleave(codes.shape[0] // outer.numel()) if outer.dim() else outer)).to(x.dtype)
