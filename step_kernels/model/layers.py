"""What every part of the model is made of: norm, linear, gated MLP, rope frequencies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nvfp4 import NVFP4Weight
from ..ops import nvfp4_linear, rms_norm, swiglu
from ..prepared import PreparedWeight
from .config import LayerConfig


class RMSNorm:
    """x / rms(x) * (1 + w) in f32, rounded to x's dtype last; the stored weight is the delta."""

    def __init__(self, weights, name: str, size: int, eps: float):
        self.weight, self.eps = weights.tensor(f"{name}.weight", (size,)), eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def linear(x: Tensor, weight: Tensor | NVFP4Weight | PreparedWeight) -> Tensor:
    """x times the weight's transpose, for a weight in any format."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else nvfp4_linear(x, weight)


class MLP:
    """down(swiglu(gate(x), up(x))): the dense layers and the share expert."""

    def __init__(self, weights, name: str, hidden: int, inner: int, limit: float | None):
        self.gate = weights.linear(f"{name}.gate_proj", inner, hidden)
        self.up = weights.linear(f"{name}.up_proj", inner, hidden)
        self.down = weights.linear(f"{name}.down_proj", hidden, inner)
        self.limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = torch.cat((linear(x, self.gate), linear(x, self.up)), -1)
        return linear(swiglu(gate_up, self.limit), self.down)


def inverse_frequencies(layer: LayerConfig, device: torch.device) -> Tensor:
    """f32 [rotary_dim / 2] in radians a position: theta ** (-2j / rotary_dim), llama3-scaled if asked."""
    j = torch.arange(0, layer.rotary_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / layer.rope_theta ** (j / layer.rotary_dim)
    scaling = layer.rope_scaling
    if scaling is None:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    smooth = (scaling.original_max / wavelength - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)
    smooth = smooth.clamp(0, 1)  # 1 keeps short waves, 0 divides long ones by the factor
    return smooth * inv_freq + (1 - smooth) * inv_freq / scaling.factor
