"""Launchers of csrc/sm90_nvfp4_prepare.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prepared import tiles
from .driver import Kernel

PACK = Kernel("sm90_nvfp4_prepare", "sm90_nvfp4_prepare_pack", "PPPPiiiii")
UNPACK = Kernel("sm90_nvfp4_prepare", "sm90_nvfp4_prepare_unpack", "PPPPiiiii")


def pack(codes: Tensor, scales: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Contiguous u8 [..., n, k/2], e4m3 [..., n, k/16] -> u8 [..., r, c, 2048] and [..., r, c, 256]."""
    lead, n, k = codes.shape[:-2], codes.shape[-2], codes.shape[-1] * 2
    rows, columns = tiles(n, k, paired)
    packed = codes.new_empty(*lead, rows, columns, 2048)
    packed_scales = codes.new_empty(*lead, rows, columns, 256)
    if packed.numel():
        arguments = (codes, scales, packed, packed_scales, rows, columns, n, k, int(paired))
        PACK.launch((packed.numel() // 2048, 1, 1), 128, *arguments)
    return packed, packed_scales


def unpack(packed: Tensor, packed_scales: Tensor, n: int, k: int, paired: bool) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    lead, (rows, columns) = packed.shape[:-3], packed.shape[-3:-1]
    codes = packed.new_empty(*lead, n, k // 2)
    scales = packed.new_empty(*lead, n, k // 16, dtype=torch.float8_e4m3fn)
    if packed.numel():
        arguments = (packed.contiguous(), packed_scales.contiguous(), codes, scales, rows, columns, n, k, int(paired))
        UNPACK.launch((packed.numel() // 2048, 1, 1), 128, *arguments)
    return codes, scales
