"""Weights in the layouts of FlashInfer's kernels: swizzled scales, reordered rows; made once a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Prepared:
    """`build(tensor, *rest)`, kept until `tensor` is freed or written to; `rest` belongs to it.

    The key is the tensor object: hand over the one that holds the weight, not a view made for the call.
    """

    def __init__(self, build: Callable):
        self._build = build
        self._kept = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor, *rest):
        # Inference tensors count no versions.
        stamp = (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        kept = self._kept.get(tensor)
        if kept is None or kept[0] != stamp:
            kept = self._kept[tensor] = (stamp, self._build(tensor, *rest))
        return kept[1]


def swizzle_scales(scales: Tensor) -> Tensor:
    """[..., rows, columns] of one byte -> [..., rows to 128, columns to 4] in tiles of 128x4, zeros where padded.

    Byte (m // 128, k // 4, m % 32, m % 128 // 32, k % 4) of [tiles, tiles, 32, 4, 4] is scale (m, k): the order
    in which tcgen05 reads block scales (CUTLASS's Sm1xxBlockScaledConfig, FlashInfer's layout_128x4).
    """
    *lead, rows, columns = scales.shape
    raw = scales.contiguous().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -columns % 4, 0, -rows % 128))
    height, width = raw.shape[-2:]
    tiles = raw.reshape(*lead, height // 128, 4, 32, width // 4, 4)
    return tiles.movedim((-4, -3), (-2, -3)).reshape(*lead, height, width).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """swizzle_scales's [..., rows to 128, columns to 4] -> [..., rows, columns]."""
    *lead, height, width = swizzled.shape
    tiles = swizzled.contiguous().view(torch.uint8).reshape(*lead, height // 128, width // 4, 32, 4, 4)
    raw = tiles.movedim((-2, -3), (-4, -3)).reshape(*lead, height, width)
    return raw[..., :rows, :columns].contiguous().view(swizzled.dtype)


def up_first(gate_up: Tensor) -> Tensor:
    """[..., 2 * inner, k], gate rows first -> up rows first, as FlashInfer's fused MoE kernels want them."""
    return torch.cat(gate_up.chunk(2, -2)[::-1], -2)


def shuffle_rows(w: Tensor) -> Tensor:
    """[..., rows, k], rows a multiple of 32 -> row 4a + b of each 32 moved to 8b + a: trtllm-gen's epilogue order."""
    return w.unflatten(-2, (-1, 8, 4)).transpose(-3, -2).flatten(-4, -2)


def interleave_gate_up(gate_up: Tensor) -> Tensor:
    """[..., 2 * inner, k], gate rows first -> up 0, gate 0, up 1, gate 1, ...: trtllm-gen's gated rows."""
    gate, up = gate_up.chunk(2, -2)
    return torch.stack((up, gate), -2).flatten(-3, -2)
