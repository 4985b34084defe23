"""Attention over a paged KV cache: a program takes some tokens of one request, all query heads of one kv head.

Rows of a tile are (token, head of the group), so that a decode step fills the 16 rows of a matrix instruction
with one token's heads. Long ranges of keys are split over programs, whose partial results a second kernel
combines in a fixed order. Grids follow from shapes alone: lengths are read on the device.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import INTERPRETED, rounded_to, sigmoid

MOST_SPLITS = 64
KEYS_PER_SPLIT = 128  # fewer would cost more in the combining kernel than they save


def _interpreted_range(*bounds):
    """The interpreter's scalars are arrays of one value, which numpy 2.4 takes for no integers."""
    return range(*(bound.handle.data.item() if isinstance(bound, tl.tensor) else bound for bound in bounds))


_range = _interpreted_range if INTERPRETED.value else tl.range


@triton.jit
def _from_cache(raw, E4M3: tl.constexpr, COMPUTE: tl.constexpr):
    """Cache values in COMPUTE; e4m3 codes come as 2^-8 of their values, which is a shift of their bits in f16."""
    if E4M3:
        code = raw.to(tl.int32)
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        bits = tl.where((code & 0x7F) == 0x7F, 0x7FFF, bits)  # NaN
        raw = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return raw.to(COMPUTE)


@triton.jit
def _dot(a, b, accumulator):
    if INTERPRETED:  # which multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "requests", "table_stride", "gate_token", "gate_head", "window"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, length_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
    tokens, requests, q_token, q_head, k_page, k_head, k_position, v_page, v_head, v_position,
    k_scale_stride, v_scale_stride, table_stride, gate_token, gate_head, window, softmax_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, E4M3: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_GATE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a prompt see most keys: first
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # Request r may use the tiles from start[r] // TOKENS + r on, enough for any lengths; the rows past the last
    # request are one more request, of no keys.
    request = tl.full((), -1, tl.int32)
    for first_request in _range(0, requests + 1, 256):
        candidate = first_request + tl.arange(0, 256)
        begin = tl.load(start_ptr + candidate, mask=candidate <= requests, other=0)
        is_before = (candidate <= requests) & (begin // TOKENS + candidate <= tile)
        request += tl.sum(is_before.to(tl.int32))
    begin = tl.load(start_ptr + request)
    end = tl.load(start_ptr + request + 1, mask=request < requests, other=0)
    end = tl.where(request < requests, end, tokens)
    length = tl.load(length_ptr + request, mask=request < requests, other=0)
    first_token = begin + (tile - begin // TOKENS - request) * TOKENS
    if first_token >= end:
        return

    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = (column < DIM)[None, :]
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < TOKENS * GROUP) & (token < end)
    position = length - end + token
    q_at = token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q = tl.load(q_ptr + q_at[:, None] + column[None, :], mask=is_row[:, None] & in_dim, other=0)

    score_scale = tl.full((ROWS,), 1.4426950408889634, tl.float32) * softmax_scale  # log2(e): exp2 is cheaper
    v_scale = 1.0
    if E4M3:
        score_scale *= tl.load(k_scale_ptr + kv_head * k_scale_stride) * 256.0
        v_scale = tl.load(v_scale_ptr + kv_head * v_scale_stride) * 256.0
        if COMPUTE == tl.float16:  # rows divided by a power of two fit f16, with 3 more bits than bf16 has
            q = q.to(tl.float32)
            exponent = (tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
            exponent = tl.minimum(exponent, 253)
            q = q * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
            score_scale *= (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    q = q.to(COMPUTE)

    stop = tl.maximum(length - end + tl.minimum(first_token + TOKENS, end), 0)
    first = tl.full((), 0, tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(length - end + first_token - window + 1, 0)
    first_block = first // KEYS
    blocks = tl.cdiv(stop, KEYS) - first_block
    if SPLIT:
        share = tl.cdiv(blocks, tl.num_programs(2))
        blocks = tl.minimum(share, blocks - split * share)
        first_block += split * share

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    for block in _range(first_block, first_block + blocks):
        key = block * KEYS + tl.arange(0, KEYS)
        is_key = (key >= first) & (key < stop)  # others may lie in pages that are not this request's
        page = tl.load(table_ptr + request.to(tl.int64) * table_stride + key // PAGE_SIZE, mask=is_key, other=0)
        page = page.to(tl.int64)
        k_at = page * k_page + kv_head.to(tl.int64) * k_head + (key % PAGE_SIZE) * k_position
        v_at = page * v_page + kv_head.to(tl.int64) * v_head + (key % PAGE_SIZE) * v_position
        inside = is_key[:, None] & in_dim
        k = _from_cache(tl.load(k_ptr + k_at[:, None] + column[None, :], mask=inside, other=0), E4M3, COMPUTE)
        scores = _dot(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32)) * score_scale[:, None]
        behind = position[:, None] - key[None, :]
        is_seen = behind >= 0
        if HAS_WINDOW:
            is_seen = is_seen & (behind < window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        offset = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2(scores - offset[:, None])
        shrink = tl.exp2(highest - offset)
        total = total * shrink + tl.sum(weight, 1)
        v = _from_cache(tl.load(v_ptr + v_at[:, None] + column[None, :], mask=inside, other=0), E4M3, COMPUTE)
        out = _dot(rounded_to(weight, COMPUTE), v, out * shrink[:, None])
        highest = new_highest

    out *= (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    heads = tl.num_programs(1) * GROUP
    at = (split.to(tl.int64) * tokens + token) * heads + head
    has_value = is_row
    if SPLIT:  # a row that saw no key here is known by its -inf, its values are never read
        tl.store(lse_ptr + at, highest + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=is_row)
        has_value = is_row & (total != 0.0)
    elif HAS_GATE:
        gate = tl.load(gate_ptr + token.to(tl.int64) * gate_token + head * gate_head, mask=is_row, other=0)
        out *= sigmoid(gate.to(tl.float32))[:, None]
    out = rounded_to(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * DIM + column[None, :], out, mask=has_value[:, None] & in_dim)


@triton.jit(do_not_specialize=["tokens", "splits", "gate_token", "gate_head"])
def _combine_kernel(
    partial_ptr, lse_ptr, gate_ptr, out_ptr, tokens, splits, gate_token, gate_head,
    HAS_GATE: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, BLOCK_DIM)
    at = (split * tokens.to(tl.int64) + token) * heads + head
    lse = tl.load(lse_ptr + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    inside = (lse != float("-inf"))[:, None] & (column < DIM)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if HAS_GATE:
        gate = tl.load(gate_ptr + token * gate_token + head * gate_head).to(tl.float32)
        out *= sigmoid(gate)
    out = rounded_to(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * heads + head) * DIM + column, out, mask=column < DIM)


def tile(q: Tensor, k_cache: Tensor, tokens_per_request: int) -> dict:
    """Compute type, rows, keys, warps and stages of a program."""
    group, block_dim = q.shape[1] // k_cache.shape[1], max(16, triton.next_power_of_2(q.shape[2]))
    if k_cache.dtype == torch.float8_e4m3fn and q.dtype != torch.float32:
        compute, most, keys = tl.float16, 128, 64
    elif k_cache.dtype == q.dtype != torch.float32:
        compute, most, keys = (tl.float16 if q.dtype == torch.float16 else tl.bfloat16), 128, 64
    else:  # no rounding before the products, as the reference has none
        compute, most, keys = tl.float32, 32, 32
    if block_dim > 128:
        most, keys = most // 2, 32
    rows = max(16, triton.next_power_of_2(group), min(most, triton.next_power_of_2(group * tokens_per_request)))
    return {
        "COMPUTE": compute,
        "ROWS": rows,
        "KEYS": keys,
        "BLOCK_DIM": block_dim,
        "num_warps": 8 if rows >= 128 else 4,
        # Five hold two blocks of keys and values beside the page numbers of later ones, in the 99 KiB of sm_89 and
        # sm_120; wider heads leave room for one.
        "num_stages": 5 if block_dim <= 128 else 4,
    }


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_table: Tensor,
    seq_lens: Tensor, query_start: Tensor, window: int | None = None, gate: Tensor | None = None,
    softmax_scale: float | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """As ops.paged_attention; `splits`, the programs that share a tile's keys, follows from shapes if not given."""
    tokens, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    requests = len(seq_lens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    constants = tile(q, k_cache, triton.cdiv(tokens, max(1, requests)))
    tile_tokens = constants["ROWS"] // (heads // kv_heads)
    tiles = tokens // tile_tokens + requests + 1
    if splits is None:
        longest = block_table.shape[1] * page_size
        longest = longest if window is None else min(longest, window + tile_tokens)
        # Three programs of 16 rows and a bf16 cache share a multiprocessor (72 KiB each of an H200's 227); at most
        # `tokens` tiles have rows.
        room = 3 * _multiprocessors(q.device) // (min(tokens, tiles) * kv_heads)
        splits = max(1, min(MOST_SPLITS, room, triton.cdiv(longest, KEYS_PER_SPLIT)))
    partial, lse = out, None
    if splits > 1:
        partial = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
    e4m3 = k_cache.dtype == torch.float8_e4m3fn
    k_cache, v_cache = (c.view(torch.uint8) if e4m3 else c for c in (k_cache, v_cache))
    gate_strides = (0, 0) if gate is None else gate.stride()
    _attention_kernel[(tiles, kv_heads, splits)](
        q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens.contiguous(), query_start.contiguous(),
        q if gate is None else gate, partial, out if lse is None else lse,
        tokens, requests, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(s.stride(0) if s.dim() else 0 for s in (k_scale, v_scale)), block_table.stride(0), *gate_strides,
        min(window or 0, 1 << 30), dim**-0.5 if softmax_scale is None else softmax_scale,
        GROUP=heads // kv_heads, DIM=dim, PAGE_SIZE=page_size, E4M3=e4m3, HAS_WINDOW=window is not None,
        HAS_GATE=gate is not None, SPLIT=splits > 1, **constants,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(tokens, heads)](
            partial, lse, q if gate is None else gate, out, tokens, splits, *gate_strides, HAS_GATE=gate is not None,
            DIM=dim, SPLITS=triton.next_power_of_2(splits), BLOCK_DIM=constants["BLOCK_DIM"], num_warps=4,
        )  # fmt: skip
    return out


def ahead_of_time():
    """(kernel, argument types, constants, warps) of each variant to compile without a GPU; see triton/build.py."""
    strides = ("q_token", "q_head", "k_page", "k_head", "k_position", "v_page", "v_head", "v_position")
    strides += ("k_scale_stride", "v_scale_stride", "table_stride", "gate_token", "gate_head")
    integers = dict.fromkeys(("tokens", "requests", *strides, "window"), "i32")
    tables = dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32")
    for cache, compute in (("u8", tl.float16), ("bf16", tl.bfloat16)):
        for rows, out in ((16, "*fp32"), (128, "*bf16")):
            types = {"q_ptr": "*bf16", "k_ptr": f"*{cache}", "v_ptr": f"*{cache}"}
            types |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", **tables}
            types |= {"gate_ptr": "*bf16", "out_ptr": out, "lse_ptr": "*fp32", **integers, "softmax_scale": "fp32"}
            constants = {"GROUP": 12, "DIM": 128, "PAGE_SIZE": 64, "E4M3": cache == "u8", "COMPUTE": compute}
            constants |= {"HAS_WINDOW": True, "HAS_GATE": True, "SPLIT": rows == 16}
            constants |= {"ROWS": rows, "KEYS": 64, "BLOCK_DIM": 128}
            yield _attention_kernel, types, constants, 8 if rows == 128 else 4
    types = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "gate_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("tokens", "splits", "gate_token", "gate_head"), "i32")
    yield _combine_kernel, types, {"HAS_GATE": True, "DIM": 128, "SPLITS": 64, "BLOCK_DIM": 128}, 4
