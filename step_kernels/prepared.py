"""The prepared layout of NVFP4 weights for Hopper: the checkpoint's bytes in the order its tensor cores take them.

Tiles of 64 rows x 64 k, padded with zeros; csrc/common/nvfp4_sm90.cuh draws one. Scales become unsigned e5m3 bytes.
Plain torch, for any device; csrc/sm90_nvfp4_prepare.cu does the same on the GPU and must agree byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import nvfp4

TILE = 64
_BIAS = (18, 10)  # of the scales of a tile's first and last 32 k: their codes become e5m2 and e4m3 operands


@dataclass(frozen=True)
class PreparedWeight:
    """An NVFP4Weight [..., n, k] in the prepared layout.

    codes u8 [..., row tiles, k tiles, 2048]; scales u8 [..., row tiles, k tiles, 256]; global_scale as it was.
    `paired`: the rows are gate rows, then as many up rows, and a tile holds 32 of each.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    shape: torch.Size = field(metadata={"argument": False})
    paired: bool = field(default=False, metadata={"argument": False})

    def __getitem__(self, expert: int | slice) -> PreparedWeight:
        scale, codes = self.global_scale[expert], self.codes[expert]
        shape = torch.Size((*codes.shape[:-3], *self.shape[-2:]))
        return PreparedWeight(codes, self.scales[expert], scale, shape, self.paired)


def tiles(n: int, k: int, paired: bool) -> tuple[int, int]:
    """Row tiles and k tiles of an [n, k] weight."""
    return -(-n // 2 // (TILE // 2)) if paired else -(-n // TILE), -(-k // TILE)


def pack(codes: Tensor, scales: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """u8 [..., n, k/2], e4m3 [..., n, k/16] without NaN or a sign -> u8 [..., r, c, 2048] and [..., r, c, 256]."""
    lead, n, k = codes.shape[:-2], codes.shape[-2], codes.shape[-1] * 2
    rows, columns = tiles(n, k, paired)
    # row tile, warp, row / 8, row; k tile, half, 16 of it, 8 of them, thread of a quad, k
    nibbles = _tiled(nvfp4.unpack(codes), rows, columns * TILE, paired).unflatten(-1, (columns, 2, 2, 2, 4, 2))
    first, second = nibbles.permute(0, 1, 5, 2, 4, 9, 7, 3, 10, 8, 6).unbind(-1)
    packed = (first & 8) << 4 | (first & 7) << 1 | (second & 8) >> 3 | (second & 7) << 4
    blocks = _tiled(scales.view(torch.uint8), rows, columns * 4, paired).unflatten(-1, (columns, 2, 2))
    table = torch.stack([_to_e5m3(bias) for bias in _BIAS]).to(scales.device)
    wide = torch.stack([table[i][blocks[..., i, :].int()] for i in range(2)], -2)
    return (
        packed.reshape(*lead, rows, columns, 2048),
        wide.permute(0, 1, 5, 2, 4, 7, 6, 3).reshape(*lead, rows, columns, 256),
    )


def unpack(codes: Tensor, scales: Tensor, n: int, k: int, paired: bool) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    lead, (rows, columns) = codes.shape[:-3], codes.shape[-3:-1]
    packed = codes.reshape(-1, rows, columns, 4, 8, 4, 2, 2, 2, 2)
    both = torch.stack((packed >> 4 & 8 | packed >> 1 & 7, (packed & 1) << 3 | packed >> 4 & 7), -1)
    nibbles = both.permute(0, 1, 3, 7, 4, 2, 10, 6, 9, 5, 8).flatten(5)
    blocks = scales.reshape(-1, rows, columns, 4, 8, 2, 2, 2).permute(0, 1, 3, 7, 4, 2, 6, 5)
    narrow = torch.zeros_like(blocks)
    for i, bias in enumerate(_BIAS):
        back = torch.zeros(256, dtype=torch.uint8)
        back[_to_e5m3(bias)[:0x7F].long()] = torch.arange(0x7F, dtype=torch.uint8)
        narrow[..., i, :] = back.to(scales.device)[blocks[..., i, :].int()]
    return (
        nvfp4.pack(_untiled(nibbles, n, k, paired)).reshape(*lead, n, k // 2),
        _untiled(narrow.flatten(5), n, k // 16, paired).reshape(*lead, n, k // 16).view(torch.float8_e4m3fn),
    )


def _tiled(x: Tensor, rows: int, columns: int, paired: bool) -> Tensor:
    """[..., n, c] -> [e, row tiles, 4, 2, 8, columns], zeros beyond: warp, row / 8 (paired: gate or up), row."""
    n, c = x.shape[-2:]
    x = x.reshape(-1, 2 if paired else 1, n // 2 if paired else n, c)
    height = rows * (TILE // 2 if paired else TILE)
    x = torch.nn.functional.pad(x, (0, columns - c, 0, height - x.shape[2]))
    if paired:
        return x.unflatten(2, (rows, 4, 8)).permute(0, 2, 3, 1, 4, 5)
    return x[:, 0].unflatten(1, (rows, 4, 2, 8))


def _untiled(x: Tensor, n: int, c: int, paired: bool) -> Tensor:
    """The inverse of `_tiled`: -> [e, n, c], contiguous."""
    if paired:
        return x.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)[:, :, : n // 2, :c].flatten(1, 2).contiguous()
    return x.flatten(1, 4)[:, :n, :c].contiguous()


def _to_e5m3(bias: int) -> Tensor:
    """u8 [256]: by e4m3 byte, the byte of the same value with 5 exponent bits; no subnormals, 0 for 0."""
    code = torch.arange(256)
    mantissa, exponent = torch.frexp(code.to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num().abs())
    byte = (exponent - 1 + bias) * 8 + (mantissa * 16).to(torch.int32) - 8
    return torch.where(code == 0, 0, byte).clamp(0, 255).to(torch.uint8)
