"""What a lane does at a time: copy some bytes of a tensor, or quantize one matrix of weights with one global scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from step_kernels import nvfp4, nvfp4_error
from step_kernels.model.checkpoint import Checkpoint, CheckpointError, Entry, Piece, read_piece

from . import fp8, lanes, matrices
from .figures import COUNTS, Weight, tally
from .formats import BLOCK_SCALES, CODES, GLOBAL_SCALE, Channels, Stored, place
from .hessian import gptq, local_gptq, output_error
from .inputs import Inputs
from .matrices import label, pieces, quantize_piece
from .plan import Group
from .shards import CHUNK, Shard

_AT_ONCE = 1 << 32  # bytes that a lane may hold while it quantizes by inputs


@dataclass
class Output:
    """Where a weight goes, what was noted of it, and which of its matrices are all zero."""

    shard: Shard
    held: list[Stored] | list[Channels]
    noted: Weight
    zeros: list[int] = field(default_factory=list)

    def write(self, matrix: int, row: int, codes: Tensor, blocks: Tensor) -> None:
        """Puts codes [rows, k / 2] and block scales [rows, k / 16] of a matrix where its rows from `row` on belong."""
        for part, data in ((CODES, codes), (BLOCK_SCALES, blocks)):
            name, at = place(self.held, part, matrix)
            self.shard.write(name, as_bytes(data), at + data.shape[-1] * row)

    def write_scale(self, matrix: int, scale: Tensor) -> None:
        """Puts a matrix's global scale, f32 [] on any device, as the format has it."""
        name, at = place(self.held, GLOBAL_SCALE, matrix)
        scale = scale.cpu()
        self.shard.write(name, as_bytes(1 / scale if self.held[0].inverse else scale), at)


def copy(entry: Entry, at: int, shard: Shard, name: str) -> int:
    """Copies at most CHUNK bytes of a tensor from its byte `at` on; gives how many."""
    size = min(CHUNK, entry.end - entry.begin - at)
    data = read_piece(Piece(entry, entry.begin + at, entry.begin + at + size), *lanes.buffers(size))
    shard.write(name, as_bytes(data), at)
    return size


def quantize(
    matrix: int,
    checkpoint: Checkpoint,
    group: Group,
    outputs: list[Output | None],
    search: str,
) -> int:
    """Quantizes one matrix of each weight of a group, but writes no weight without an output; gives the bytes of all.

    Gate and up, which share a scale, may lie in different shards, one of them finished before an earlier run stopped.
    """
    ranges = [pieces(checkpoint.entry(weight).shape)[matrix] for weight in group.weights]
    buffers = lanes.buffers(*(matrices.piece_bytes(checkpoint, weight) for weight in group.weights))
    held, tops, device = [], [], lanes.device()
    for weight, parts, buffer in zip(group.weights, ranges, buffers):
        amax = []
        for begin, end in parts:
            x, top = matrices.read_piece(checkpoint, weight, begin, end, device, buffer)
            amax.append(top)
        held.append(x)
        tops.append(torch.stack(amax).amax())
    scale = nvfp4.global_scale(torch.stack(tops).amax(), search)
    if not scale > 0:
        which = label(checkpoint.entry(group.weights[0]).shape, matrix)
        raise CheckpointError(f"{group.weights[0]}: {which}weights are too small, amax {float(max(tops)):.3g}")
    for weight, parts, buffer, x, top, output in zip(group.weights, ranges, buffers, held, tops, outputs):
        if output is None:
            continue
        for begin, end in parts:
            if len(parts) > 1:  # once more: the scale needs all of a linear, memory holds but a piece
                x, _ = matrices.read_piece(checkpoint, weight, begin, end, device, buffer)
            codes, blocks, sums = quantize_piece(x, scale, search)
            output.write(matrix, begin - parts[0][0], codes, blocks)
            output.noted.add(matrix, sums, scale, tally(x, codes, blocks, scale))
        output.write_scale(matrix, scale)
        if top == 0:
            output.zeros.append(matrix)
    return sum(
        source_bytes(checkpoint, weight) // len(pieces(checkpoint.entry(weight).shape)) for weight in group.weights
    )


def to_fp8(begin: int, end: int, checkpoint: Checkpoint, weight: str, output: Output) -> int:
    """Puts rows begin to end - 1 of a linear in FP8; gives their bytes in the source."""
    entry = checkpoint.entry(weight)
    buffers = lanes.buffers(matrices.piece_bytes(checkpoint, weight))
    x, _ = matrices.read_piece(checkpoint, weight, begin, end, lanes.device(), *buffers)
    codes, scales, sums = fp8.quantize(x)
    if not (scales > 0).all():
        raise CheckpointError(f"{weight}: row {begin + int((~(scales > 0)).nonzero()[0])}: weights are too small")
    for name, data, row in zip(output.held[0].names, (codes, scales), (codes.shape[1], 4)):
        output.shard.write(name, as_bytes(data), row * begin)
    output.noted.add(0, sums, torch.zeros(()), torch.zeros(COUNTS, dtype=torch.int64))
    return (entry.end - entry.begin) // entry.shape[0] * (end - begin)


def quantize_for_inputs(
    begin: int, end: int, checkpoint: Checkpoint, group: Group, outputs: list[Output | None], inputs: Inputs
) -> int:
    """The same for matrices begin to end - 1 together, by the Hessians of the `inputs` that a group's weights share."""
    device, first = lanes.device(), group.weights[0]
    entries = [checkpoint.entry(weight) for weight in group.weights]
    dtypes = {torch.float32 if entry.dtype == torch.float8_e4m3fn else entry.dtype for entry in entries}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    rows = [entry.shape[-2] for entry in entries]
    x = torch.empty(end - begin, sum(rows), entries[0].shape[-1], dtype=dtype, device=device)
    (buffer,) = lanes.buffers(max(matrices.piece_bytes(checkpoint, weight) for weight in group.weights))
    tops = torch.zeros(len(group.weights), end - begin, device=device)
    for weight, entry, part, top in zip(group.weights, entries, x.split(rows, 1), tops):
        for i, ranges in enumerate(pieces(entry.shape)[begin:end]):
            at = 0
            for piece in ranges:
                read, amax = matrices.read_piece(checkpoint, weight, *piece, device, buffer)
                part[i, at : at + len(read)] = read
                top[i], at = torch.maximum(top[i], amax), at + len(read)
    scales = nvfp4.global_scale(tops.amax(0))
    for matrix in (begin + (~(scales > 0)).nonzero().flatten()).tolist():
        raise CheckpointError(f"{first}: {label(entries[0].shape, matrix)}weights are too small")
    hessians = inputs.hessians(begin, end).to(device)
    try:
        wanted = inputs.wanted(begin, end, x, hessians)
        packed, chosen = (gptq if inputs.whole else local_gptq)(wanted, scales, hessians)
    except torch.linalg.LinAlgError as e:
        raise CheckpointError(f"{first}: its inputs' Hessian cannot be factored: {e}") from None
    parts = zip(group.weights, *(t.split(rows, 1) for t in (x, packed, chosen)), tops, outputs)
    for weight, part, codes, blocks, top, output in parts:
        inputs.take(begin, weight, part, nvfp4.dequantize(codes, blocks, scales))
        if output is None:
            continue
        for matrix, *of in zip(range(begin, end), part, codes, blocks, scales, hessians):
            _note(output, matrix, *of)
            output.write_scale(matrix, of[3])
        output.zeros += (begin + (top == 0).nonzero().flatten()).tolist()
    return sum((entry.end - entry.begin) // len(pieces(entry.shape)) * (end - begin) for entry in entries)


def quantize_in_turn(ends: list[tuple[int, int]], *arguments) -> int:
    """quantize_for_inputs for one part after the other, of experts that make up for each other's errors."""
    return sum(quantize_for_inputs(*some, *arguments) for some in ends)


def _note(
    output: Output, matrix: int, x: Tensor, codes: Tensor, blocks: Tensor, scale: Tensor, hessian: Tensor
) -> None:
    """Writes a matrix [n, k] in its quantized form, and notes what it errs by."""
    decoded = nvfp4.dequantize(codes, blocks, scale)
    output.noted.add_outputs(matrix, output_error(x, decoded, hessian))
    sums, codes, blocks = nvfp4_error(x, codes, blocks, scale), codes.cpu(), blocks.view(torch.uint8).cpu()
    output.write(matrix, 0, codes, blocks)
    output.noted.add(matrix, sums, scale, tally(x, codes, blocks, scale))


def at_once(checkpoint: Checkpoint, group: Group, inputs: Inputs) -> int:
    """How many matrices of a group quantize_for_inputs may take: it holds up to 34 bytes a weight, of it six numbers in
    f32 and the encoding's temporaries, and gptq sixteen a sum: as given, damped, in order and factored."""
    weights = sum(math.prod(checkpoint.entry(weight).shape[-2:]) for weight in group.weights)
    sums = inputs.sums[0].numel()
    return max(1, _AT_ONCE // (34 * weights + 16 * sums))


def source_bytes(checkpoint: Checkpoint, weight: str) -> int:
    """Bytes of a weight in its source."""
    entry = checkpoint.entry(weight)
    return entry.end - entry.begin


def host_bytes(checkpoint: Checkpoint, group: Group) -> int:
    """Host memory for one matrix of each weight of a group: as read, in f32 if it is FP8, and quantized."""
    sizes = {weight: matrices.piece_bytes(checkpoint, weight) for weight in group.weights}
    return sum(n * (9 if checkpoint.entry(w).dtype == torch.float8_e4m3fn else 1) + n // 3 for w, n in sizes.items())


def as_bytes(t: Tensor):
    """The bytes of a host tensor."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy()
