"""What every part of the model is made of: norm, linear, gated MLP, rope frequencies."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .. import ops
from ..ops import add_rms_norm, nvfp4_linear, rms_norm, swiglu
from ..prepared import TILE, PreparedWeight
from .config import LayerConfig
from .formats import FP8Channels


class RMSNorm:
    """x / rms(x) * (1 + w) in f32, rounded to x's dtype last; the stored weight is the delta."""

    def __init__(self, weights, name: str, size: int, eps: float):
        self.weight, self.eps = weights.tensor(f"{name}.weight", (size,)), eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, addends: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The norm of x and up to two addends together, and their sum."""
        if not addends:
            return self(x), x
        return add_rms_norm(addends[0], x, self.weight, self.eps, *addends[1:])


def linear(x: Tensor, weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times the transpose of a weight in any format, or what a weight that can be called makes of it, in x's dtype or
    out_dtype."""
    if callable(weight):
        return weight(x, out_dtype)
    if isinstance(weight, Tensor):
        return ops.linear(x, weight, out_dtype)
    if isinstance(weight, FP8Channels):
        return ops.fp8_linear(x, weight.codes, weight.scale, out_dtype)
    return nvfp4_linear(x, weight).to(out_dtype or x.dtype)


class Linears:
    """Several linears of one input; neighbours that are plain, FP8 or prepared alike are multiplied as one."""

    def __init__(self, *weights):
        self.rows, self.groups = [w.shape[0] for w in weights], []
        for kind, group in itertools.groupby(weights, _kind):
            group = list(group)
            self.groups += [(_JOINED[kind](group), len(group))] if kind in _JOINED else [(w, 1) for w in group]

    @property
    def weights(self) -> list:
        """The weights that it multiplies by, in order."""
        return [weight for weight, _ in self.groups]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., k] -> [..., rows] of each linear."""
        out, rows = [], iter(self.rows)
        for weight, count in self.groups:
            wanted = list(itertools.islice(rows, count))
            stored = [-(-n // TILE) * TILE for n in wanted] if isinstance(weight, PreparedWeight) else wanted
            y = linear(x, weight)
            out += [y] if count == 1 else [part[..., :n] for part, n in zip(y.split(stored, -1), wanted)]
        return out

    @property
    def whole(self):
        """The weight that has all rows and no others, or None."""
        weight = self.weights[0]
        return weight if len(self.groups) == 1 and weight.shape[0] == sum(self.rows) else None

    def joined(self, x: Tensor) -> Tensor:
        """x [..., k] -> the outputs side by side."""
        return torch.cat(self(x), -1) if self.whole is None else linear(x, self.whole)


def _kind(weight):
    """What neighbours must have in common to be joined; a weight that is trained stays as it is."""
    return id(weight) if isinstance(weight, Tensor) and weight.requires_grad else type(weight)


def _stacked(weights: list[PreparedWeight]) -> PreparedWeight:
    """One below the other in whole tiles, rows of zeros between; a global scale a tile."""
    if len(weights) == 1:
        return weights[0]
    codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
    outer = torch.cat([w.global_scale.expand(len(w.codes)) for w in weights])
    return PreparedWeight(codes, scales, outer, torch.Size((TILE * len(codes), weights[0].shape[1])))


_JOINED = {
    Tensor: torch.cat,
    FP8Channels: lambda weights: FP8Channels(
        torch.cat([w.codes.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn),
        torch.cat([w.scale for w in weights]),
    ),
    PreparedWeight: _stacked,
}


class MLP:
    """down(swiglu(gate(x), up(x))): the dense layers and the share expert."""

    def __init__(self, weights, name: str, hidden: int, inner: int, limit: float | None):
        self.gate_up = Linears(*(weights.linear(f"{name}.{part}_proj", inner, hidden) for part in ("gate", "up")))
        self.down = weights.linear(f"{name}.down_proj", hidden, inner)
        self.limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.gate_up.whole
        if isinstance(weight, Tensor):
            inner = ops.linear_swiglu(x, weight, self.limit)
        elif isinstance(weight, FP8Channels):
            inner = ops.fp8_linear_swiglu(x, weight.codes, weight.scale, self.limit)
        else:
            inner = swiglu(self.gate_up.joined(x), self.limit)
        return linear(inner, self.down)


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
