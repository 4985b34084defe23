"""Launchers of csrc/sm90_nvfp4_{prefill,prefill_few,prefill_halves,moe_prefill}.cu: prepared NVFP4 x bf16 tokens.

Prepared codes are u8 [..., blocks, chunks, 2048], scales u8 [..., blocks, chunks, 256]: a tile of 64 rows x 64 k each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import Kernel, multiprocessors
from .nvfp4_prefill_plan import BLOCKS, HALVES_STEP, SIZES, STEP, bounds, dense_plan, moe_kernel
from .tensor_map import encode

TILE_ROWS, TILE_K = 64, 64
BOX, MANY_OUT, HALVES_GROUP = 32, 16, 8  # tokens of one copy; of the many kernel's outputs; of a halves_ kernel's
GROUP = 8  # token tiles that go through the weight together: 16 MB of x at k = 4096, so that L2 holds them
MAX_EXPERTS = 1024  # threads of the sort, one an expert
_LARGEST = 1 << 30  # bytes of sorted x at a time, without its padding

_SHARE = 1024  # pairs of a block of the sort, where there are at least 8 such shares

# Alignment, stages of x (and of the weights), staged outputs.
_SHARED_BYTES = {name: 1024 + 4 * 256 * 128 + 2 * 256 * 128 for name in SIZES}
for _name, _chunks, _most in (
    ("few_64", 5 * STEP, 64), ("few_96", 4 * STEP, 96), ("few_128", 3 * STEP, 128),
    ("halves_32", 4 * HALVES_STEP, 32), ("halves_48", 3 * HALVES_STEP, 48),
):  # fmt: skip
    _SHARED_BYTES[_name] = 1024 + _chunks * (_most * 128 + BLOCKS * 2304) + BLOCKS * _most * 128

# The tensor maps are one parameter, the last: the driver reads all their bytes from the first q's address.
_PARAMETERS = {
    "": "PPPPPiiiiiiiif" + 32 * "q", "_few": "PPPPPPiiiiiiiiif" + 32 * "q",
    "_halves": "PPPPPPPPiiiiiiiiiif" + 16 * "q",
}  # fmt: skip


def _kernels(kind: str) -> dict[str, Kernel]:
    kernels = {}
    for name, shared_bytes in _SHARED_BYTES.items():
        family, _, size = f"_{name}".rpartition("_")
        source = f"sm90_nvfp4_prefill{family}"
        kernels[name] = Kernel(source, f"{source}_{kind}_{size}", _PARAMETERS[family], shared_bytes, family != "")
    return kernels


PLAIN, PAIRED = _kernels("plain"), _kernels("paired")
SUM = Kernel("sm90_nvfp4_prefill_few", "sm90_nvfp4_prefill_few_sum", "PPPiiiii", dependent=True)
COUNT = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_count", "PPii")
SORT = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_sort", "PPPPPiiI")
GATHER = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_gather", "PPPqii")
HALVES = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_halves", "PPPPqiii")
COMBINE = Kernel("sm90_nvfp4_moe_prefill", "sm90_nvfp4_moe_prefill_combine", "PPPPii")


def linear(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int) -> Tensor:
    """bf16 [..., k], a prepared plain weight [n, k], global_scale f32 [] or [parts] -> bf16 [..., n]."""
    rows = _copyable(x.reshape(-1, x.shape[-1]))
    out = x.new_empty(len(rows), -(-n // 8) * 8)  # the copy engine writes rows of a multiple of 16 bytes
    if out.numel() == 0 or x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], n)
    blocks, chunks = codes.shape[:2]
    processors = multiprocessors(x.device.index)
    name, size, splits = dense_plan(len(rows), blocks, chunks, processors)
    token_tiles = -(-len(rows) // size)
    weight = (codes, scales, global_scale.contiguous())
    if name == "many":
        _many(PLAIN[name], rows, weight, (0, 0, token_tiles, size, GROUP), out, n, processors)
        return out[:, :n].reshape(*x.shape[:-1], n)
    units = token_tiles * -(-size // BOX)
    partial = rows.new_empty(splits, units, blocks, TILE_ROWS * BOX, dtype=torch.float32) if splits > 1 else 0
    product, values = (_few, rows)
    if name.startswith("halves_"):
        product, values = _halves_product, _halves(rows, 0, token_tiles * size, 1)
    product(PLAIN[name], values, weight, (0, 0, partial, token_tiles, size), splits, out, n, processors)
    if splits > 1:
        values = (splits, len(rows), global_scale.numel(), n, out.shape[1])
        SUM.launch((blocks, units, 1), 128, partial, weight[2], out, *values)
    return out[:, :n].reshape(*x.shape[:-1], n)


def moe(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor], inner: int, limit: float | None,
) -> Tensor:  # fmt: skip
    """bf16 [tokens, hidden], f32 and i32 [tokens, top_k] -> bf16 [tokens, hidden].

    `gate_up` (paired) and `down` (plain) are prepared (codes, scales, global_scale) of the experts.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0 or ids.numel() == 0 or gate_up[0].numel() == 0:
        return out.zero_()
    x, weights, ids = _copyable(x), weights.contiguous(), ids.contiguous()
    step = max(1, _LARGEST // (2 * ids.shape[1] * x.shape[1]))
    for t in range(0, len(x), step):
        part = slice(t, t + step)
        _moe(x[part], weights[part], ids[part], gate_up, down, inner, limit, out[part])
    return out


def _moe(x, weights, ids, gate_up, down, inner_size, limit, out) -> None:
    (tokens, hidden), (_, top_k), experts = x.shape, ids.shape, len(gate_up[0])
    name = moe_kernel(ids.numel() / experts)
    tiles, rows = bounds(ids.numel(), experts, SIZES[name])
    position, table, count = sort(ids, experts, SIZES[name], tiles)
    sorted_rows, inner = x.new_empty(rows, hidden), x.new_empty(rows, inner_size)
    halves = name.startswith("halves_")
    if halves:
        values = _halves(x, position, rows, top_k)
    else:
        values = sorted_rows
        GATHER.launch((tokens, 1, 1), 256, x, position, sorted_rows, x.stride(0), hidden, top_k)
    processors = multiprocessors(x.device.index)
    limit = float("inf") if limit is None else limit
    for kernel, weight, to, columns in (
        (PAIRED[name], gate_up, inner, 32),
        (PLAIN[name], down, sorted_rows, 64),  # the sorted x has been read
    ):
        weight = (*weight[:2], weight[2].contiguous())
        if name == "many":
            work = (table, count, tiles, 0, 1)
            _many(kernel, values, weight, work, to, to.shape[1], processors, limit, columns)
        else:
            product, work = _halves_product if halves else _few, (table, count, 0, tiles, 0)
            product(kernel, values, weight, work, 1, to, to.shape[1], processors, limit, columns)
        if to is inner:
            values = _halves(inner, 0, rows, 1) if halves else inner
    COMBINE.launch((tokens, -(-hidden // 2048), 1), 256, sorted_rows, weights, position, out, hidden, top_k)


def sort(ids: Tensor, experts: int, sizes: tuple[int, ...], tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """i32 ids -> each one's row in sorted x or -1, table [tiles, 4] {expert, first row, size, 0}, tiles used [1]."""
    position, table, count = torch.empty_like(ids), ids.new_empty(tiles, 4), ids.new_empty(1)
    pairs, counts, blocks = ids.numel(), 0, ids.numel() // _SHARE
    if blocks < 8:
        blocks = 1
    else:
        counts = ids.new_empty(blocks, experts)
        COUNT.launch((blocks, 1, 1), 1024, ids, counts, pairs, experts)
    SORT.launch((blocks, 1, 1), 1024, ids, counts, position, table, count, pairs, experts, size_bits(sizes))
    return position, table, count


def size_bits(sizes: tuple[int, ...]) -> int:
    """Bit i set where 8 * (i + 1) is one of the sizes."""
    return sum(1 << size // 8 - 1 for size in sizes)


def _few(kernel, x, weight, work, splits, out, rows, multiprocessors, limit=0.0, box_columns=64) -> None:
    """`work`: tiles, tile_count, partial, (at most) token_tiles, tile_tokens."""
    shape = _shape(weight)
    row_tiles, steps = -(-shape[0] // BLOCKS), -(-shape[1] // STEP)
    values = (*work, row_tiles, splits, -(-steps // splits), *shape, rows, limit)
    grid = (min(multiprocessors, work[3] * row_tiles * splits), 1, 1)
    maps = (*tensor_map(x, TILE_K), *tensor_map(out, box_columns))
    kernel.launch(grid, 128 * (1 + BLOCKS), *weight, *values, *maps)


def _halves(x: Tensor, position: Tensor | int, rows: int, top_k: int) -> tuple[Tensor, Tensor, int]:
    """bf16 [tokens, k] to rows `position` -> FP8 halves of x, f32 factors of the rows, groups of rows."""
    groups, steps = -(-rows // HALVES_GROUP), -(-x.shape[1] // (HALVES_STEP * TILE_K))
    halves = x.new_empty(steps, groups, HALVES_GROUP * HALVES_STEP * 2 * TILE_K, dtype=torch.uint8)
    factors = x.new_empty(groups * HALVES_GROUP, dtype=torch.float32)
    values = (x, position, halves, factors, x.stride(0), x.shape[1], groups, top_k)
    HALVES.launch((len(x), 1, 1), min(256, 32 * steps), *values)
    return halves, factors, groups


def _halves_product(
    kernel, halves, weight, work, splits, out, rows, multiprocessors, limit=0.0, box_columns=64
) -> None:
    """`work`: tiles, tile_count, partial, (at most) token_tiles, tile_tokens."""
    shape = _shape(weight)
    row_tiles, steps = -(-shape[0] // BLOCKS), -(-shape[1] // HALVES_STEP)
    values = (*work[:3], *halves, *work[3:], row_tiles, splits, -(-steps // splits), *shape, rows, limit)
    grid = (min(multiprocessors, work[3] * row_tiles * splits), 1, 1)
    kernel.launch(grid, 128 * (1 + BLOCKS), *weight, *values, *tensor_map(out, box_columns, HALVES_GROUP))


def _many(kernel, x, weight, work, out, rows, multiprocessors, limit=0.0, box_columns=64) -> None:
    """`work`: tiles, tile_count, (at most) token_tiles, tile_tokens, group."""
    shape = _shape(weight)
    row_tiles = -(-shape[0] // BLOCKS)
    clusters = min(multiprocessors // 2, work[2] * row_tiles)
    maps = (*tensor_map(x, TILE_K), *tensor_map(out, box_columns, MANY_OUT))
    kernel.launch((2 * clusters, 1, 1), 384, *weight, *work, row_tiles, *shape, rows, limit, *maps)


def _shape(weight) -> tuple[int, int, int]:
    """Blocks of 64 rows, chunks of 64 k, and the parts of rows that have a global scale of their own."""
    codes, _, global_scale = weight
    return *codes.shape[-3:-1], global_scale.numel() // (len(codes) if codes.dim() == 4 else 1)


def _copyable(x: Tensor) -> Tensor:
    """x, or a copy whose rows start at multiples of 16 bytes."""
    aligned = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def tensor_map(x: Tensor, columns: int, rows: int = BOX) -> tuple[int, ...]:
    """How the copy engine goes through bf16 [m, k]: boxes of `rows` x 64 or 32 columns, swizzled, 0 outside."""
    sizes, strides = (x.shape[1], x.shape[0]), (2 * x.stride(0),)
    return encode(x.data_ptr(), 2, sizes, strides, (columns, rows), 2 * columns)
