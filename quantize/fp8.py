"""Weights in FP8: e4m3 codes with a scale a row. Engines quantize the activations themselves, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels.model.formats import fp8_channels

_ELEMENTS = 1 << 18  # at a time: temporaries of 1 MB, which stay in a CPU's cache


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k] on any device -> on the host codes e4m3 [n, k], scales f32 [n], and f64 [2]: squared error, squared size.

    A row's scale is its amax / 448, 1 for a row of zeros; codes are rounded to nearest even. Both are single IEEE
    operations in f32, so that all devices give the same bytes.
    """
    codes, scales, sums = [], [], []
    for rows in weight.split(max(1, _ELEMENTS // weight.shape[1])):
        held, x = fp8_channels(rows), rows.float()
        difference = held.dequantize() - x
        sums.append(torch.stack([t.square().sum(dtype=torch.float64) for t in (difference, x)]))
        codes.append(held.codes.view(torch.uint8))
        scales.append(held.scale)
    return torch.cat(codes).cpu().view(torch.float8_e4m3fn), torch.cat(scales).cpu(), torch.stack(sums).sum(0).cpu()
