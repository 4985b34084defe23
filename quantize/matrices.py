"""A weight in pieces, an expert or some rows: read from the source, quantized, and compared with what it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from step_kernels import nvfp4
from step_kernels.model.checkpoint import Checkpoint, CheckpointError

from .layout import FP8_BLOCK

# Elements worked on at a time on a CPU: the temporaries, 1 MB each, stay in cache. 8 (max) and 2 times (mse) faster
# than the 5,242,880 of a real expert at once.
_CPU_CHUNK = 1 << 18
_PIECE = 1 << 22  # elements of a linear held at a time, about an expert's


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


def read_piece(checkpoint: Checkpoint, weight: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """A range of `pieces` as [rows, k], as stored or f32 from an FP8 source, and amax f32 []; NaN, inf are errors."""
    x = checkpoint.read(weight, begin, end)
    if x.dtype == torch.float8_e4m3fn:
        first, last = (begin, end) if x.dim() == 3 else (begin // FP8_BLOCK, -(-end // FP8_BLOCK))
        inverse = checkpoint.read(f"{weight}_scale_inv", first, last)
        n, k = x.shape[-2:]
        x = x.float()
        x *= inverse.repeat_interleave(FP8_BLOCK, -2)[..., :n, :].repeat_interleave(FP8_BLOCK, -1)[..., :k]
    amax = x.abs().amax().float()
    if not torch.isfinite(amax):
        entry = checkpoint.entry(weight)
        which = label(entry.shape, begin)
        raise CheckpointError(f"{entry.file}: {entry.stored_name}: {which}holds NaN or infinity")
    return x.reshape(-1, x.shape[-1]), amax


def quantize_piece(weight: Tensor, scale: Tensor, search: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k], f32 [] -> codes u8 [n, k/2], block scales as u8 [n, k/16], and f64 [2]: squared error, squared size."""
    codes, blocks, sums = [], [], torch.zeros(2, dtype=torch.float64)
    scale = scale.to(device)
    for rows in _row_chunks(weight, device):
        x = rows.to(device).float()
        block_scales = nvfp4.search_scales(x, scale, search)
        packed, _ = nvfp4.quantize(x, scale, block_scales)
        sums += squared_error(x, packed, block_scales, scale).cpu()
        codes.append(packed.cpu())
        blocks.append(block_scales.view(torch.uint8).cpu())
    return torch.cat(codes), torch.cat(blocks), sums


def piece_error(weight: Tensor, codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """[n, k] and its quantized form -> f64 [2]: squared error, squared size."""
    chunks = zip(*(_row_chunks(t, weight.device, weight.shape[1]) for t in (weight, codes, blocks)))
    return torch.stack([squared_error(x.float(), c, b, scale) for x, c, b in chunks]).sum(0)


def squared_error(x: Tensor, codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """f64 [2]: sum((decoded - x)^2) and sum(x^2)."""
    difference = nvfp4.dequantize(codes, blocks, scale) - x
    return torch.stack([t.square().sum(dtype=torch.float64) for t in (difference, x)])


def _row_chunks(t: Tensor, device: torch.device, width: int | None = None) -> Iterator[Tensor]:
    if device.type != "cpu":
        return iter((t,))
    return iter(t.split(max(1, _CPU_CHUNK // (width or t.shape[1]))))
