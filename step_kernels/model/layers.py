"""What every part of the model is made of: norm, linear, gated MLP, rope frequencies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nvfp4 import NVFP4Weight
from ..ops import nvfp4_linear, rms_norm, swiglu
from ..prepared import TILE, PreparedWeight
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


class Linears:
    """Several linears of one input, multiplied as one where all of their weights are plain or all are prepared."""

    def __init__(self, *weights: Tensor | NVFP4Weight | PreparedWeight):
        self.weights, self.rows = weights, [w.shape[0] for w in weights]
        if all(isinstance(w, Tensor) and not w.requires_grad for w in weights):
            self.weights = (torch.cat(weights),)
        elif all(isinstance(w, PreparedWeight) for w in weights):
            self.weights = (_stacked(weights),)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., k] -> [..., rows] of each."""
        if len(self.weights) > 1:
            return [linear(x, weight) for weight in self.weights]
        (weight,) = self.weights
        widths = self.rows if isinstance(weight, Tensor) else [-(-n // TILE) * TILE for n in self.rows]
        return [y[..., :n] for y, n in zip(linear(x, weight).split(widths, -1), self.rows)]

    def joined(self, x: Tensor) -> Tensor:
        """x [..., k] -> the outputs side by side."""
        alone = len(self.weights) == 1 and self.weights[0].shape[0] == sum(self.rows)
        return linear(x, self.weights[0]) if alone else torch.cat(self(x), -1)


def _stacked(weights: tuple[PreparedWeight, ...]) -> PreparedWeight:
    """One below the other in whole tiles, rows of zeros between; a global scale a tile."""
    codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
    outer = torch.cat([w.global_scale.expand(len(w.codes)) for w in weights])
    return PreparedWeight(codes, scales, outer, torch.Size((TILE * len(codes), weights[0].shape[1])))


class MLP:
    """down(swiglu(gate(x), up(x))): the dense layers and the share expert."""

    def __init__(self, weights, name: str, hidden: int, inner: int, limit: float | None):
        self.gate_up = Linears(*(weights.linear(f"{name}.{part}_proj", inner, hidden) for part in ("gate", "up")))
        self.down = weights.linear(f"{name}.down_proj", hidden, inner)
        self.limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        return linear(swiglu(self.gate_up.joined(x), self.limit), self.down)


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
