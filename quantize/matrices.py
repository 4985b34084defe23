"""A weight in pieces, an expert or some rows: read from the source and quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels import nvfp4, nvfp4_error, nvfp4_search
from step_kernels.model import checkpoint as stored
from step_kernels.model.checkpoint import Checkpoint, CheckpointError

from . import search as lookup
from .layout import FP8_BLOCK

# Elements worked on at a time: on a CPU the temporaries, 1 MB each, stay in cache (8 times as fast for `max`, 2 for
# `mse`, as the 5,242,880 of a real expert at once); on a GPU they are what a lane adds to its memory, 8 MB each.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 21}
_PIECE = 1 << 22  # elements of a linear held at a time, about an expert's
_CPU = torch.device("cpu")


def pieces(shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """[n, k] or [experts, n, k] -> for each matrix the ranges of the first dimension to read one after the other.

    An expert is one range; a linear's rows are cut where an FP8 source's scale blocks are.
    """
    if len(shape) == 3:
        return [[(expert, expert + 1)] for expert in range(shape[0])]
    n, k = shape
    rows = FP8_BLOCK * max(1, _PIECE // (FP8_BLOCK * k))
    return [[(begin, min(begin + rows, n)) for begin in range(0, n, rows)]]


def label(shape: tuple[int, ...], matrix: int) -> str:
    """How a message names one matrix of a weight or scale of that shape: nothing where there is but one."""
    return f"expert {matrix}: " if len(shape) in (1, 3) else ""


def read_piece(
    checkpoint: Checkpoint,
    weight: str,
    begin: int,
    end: int,
    device: torch.device = _CPU,
    buffer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A range of `pieces` as [rows, k], as stored or f32 from an FP8 source, and amax f32 []; NaN, inf are errors.

    On a CPU it lies in `buffer`, u8 on the host, where one is given.
    """
    x = _read(checkpoint, weight, begin, end, device, buffer)
    if x.dtype == torch.float8_e4m3fn:
        first, last = (begin, end) if x.dim() == 3 else (begin // FP8_BLOCK, -(-end // FP8_BLOCK))
        inverse = _read(checkpoint, f"{weight}_scale_inv", first, last, device)
        n, k = x.shape[-2:]
        x = x.float()
        x *= inverse.repeat_interleave(FP8_BLOCK, -2)[..., :n, :].repeat_interleave(FP8_BLOCK, -1)[..., :k]
    ends = [torch.stack(part.aminmax()) for part in x.view(-1).split(_CHUNK[device.type])]
    amax = torch.stack(ends).abs().amax().float()
    if not torch.isfinite(amax):
        entry = checkpoint.entry(weight)
        which = label(entry.shape, begin)
        raise CheckpointError(f"{entry.file}: {entry.stored_name}: {which}holds NaN or infinity")
    return x.reshape(-1, x.shape[-1]), amax


def quantize_piece(weight: Tensor, scale: Tensor, search: str) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k], f32 [] on one device -> on the host codes u8 [n, k/2], block scales as u8 [n, k/16], and f64 [2]: squared
    error, squared size."""
    looked_up = lookup.quantize(weight, scale, search)
    if looked_up is not None:
        return looked_up
    if weight.is_cuda:
        codes, blocks = nvfp4_search(weight, scale, search)
        return tuple(_to_host(t) for t in (codes, blocks, nvfp4_error(weight, codes, blocks, scale)))
    codes, blocks, sums = [], [], []
    for rows in weight.split(max(1, _CHUNK[weight.device.type] // weight.shape[1])):
        x = rows.float()
        block_scales = nvfp4.search_scales(x, scale, search)
        packed, _ = nvfp4.quantize(x, scale, block_scales)
        sums.append(nvfp4_error(x, packed, block_scales, scale))
        codes.append(packed)
        blocks.append(block_scales.view(torch.uint8))
    return tuple(_to_host(t) for t in (torch.cat(codes), torch.cat(blocks), torch.stack(sums).sum(0)))


def piece_bytes(checkpoint: Checkpoint, weight: str) -> int:
    """The most bytes that a range of `pieces` has in the source."""
    entry = checkpoint.entry(weight)
    most = max(end - begin for parts in pieces(entry.shape) for begin, end in parts)
    return (entry.end - entry.begin) // entry.shape[0] * most


def _read(
    checkpoint: Checkpoint, name: str, begin: int, end: int, device: torch.device, buffer: Tensor | None = None
) -> Tensor:
    """A range of a tensor's first dimension, on the device."""
    entry = checkpoint.entry(name)
    (piece,) = stored.pieces(entry, entry.end - entry.begin, (begin, end))
    host = stored.read_piece(piece, None if buffer is None else buffer[: piece.end - piece.begin])
    return host.view(entry.dtype).view(end - begin, *entry.shape[1:]).to(device)


def _to_host(t: Tensor) -> Tensor:
    t = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
    return t if t.device.type == "cpu" else torch.empty_like(t, device="cpu", pin_memory=True).copy_(t)
