"""W4A4: activations in NVFP4 too, for Blackwell's FP4 tensor cores. Faster and less accurate, so only on request.

On Gaussian data the output's SQNR falls from 20.5 to 17.5 dB (`max` scales), from 21.9 to 18.1 dB (`mse`).
Kernels that do so refuse every call unless the environment has STEP_KERNELS_W4A4=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import nvfp4


def refuse() -> str | None:
    """Why a W4A4 kernel may not serve: nobody allowed it to round activations to 4 bits."""
    if os.environ.get("STEP_KERNELS_W4A4") != "1":
        return "rounds activations to 4 bits; STEP_KERNELS_W4A4=1 allows that"


def activation_scale(x: Tensor) -> Tensor:
    """[...] float, not empty -> f32 []: amax / 2688 of this call's activations, 1 where all are zero. No sync."""
    return nvfp4.global_scale(x.abs().amax())


def nvfp4_linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """The reference of W4A4 kernels: nvfp4_linear of x quantized with `max` block scales and rounded to 4 bits."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = nvfp4.NVFP4Weight(codes, scales, global_scale).dequantize(compute)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], codes.shape[0])
    outer = activation_scale(x)
    rounded = nvfp4.dequantize(*nvfp4.quantize(x, outer), outer, compute)
    return (rounded @ weight.mT).to(x.dtype)
