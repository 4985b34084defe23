"""What a decode step reads besides weights and pages, made where the last step left its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, define, expect, lazy
from .swiglu import FLOATS


def _check(token, position, source, padding, tables, page_size, embeddings):
    expect("token", token, (None,), torch.int64)
    expect("position", position, tuple(token.shape), torch.int32)
    expect("source", source, (None,), torch.int64)
    expect("padding", padding, tuple(source.shape), torch.int64)
    expect("tables", tables, (None, None, None), torch.int32)
    expect("embeddings", embeddings, (None, None), FLOATS)
    if page_size < 1:
        raise ValueError(f"page_size: got {page_size}, wanted at least 1")


def _fake(token, position, source, padding, tables, page_size, embeddings):
    rows, (groups, _, columns) = len(source), tables.shape
    counts = (position.new_empty(rows) for _ in range(2))
    slots, row_tables = token.new_empty(groups, rows), tables.new_empty(groups, rows, columns)
    return embeddings.new_empty(rows, embeddings.shape[1]), *counts, slots, row_tables


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel(
            "cuda", lazy("cuda.decode_inputs.launch"), (90, 129), "cuda.bindings", lazy("cuda.decode_inputs.refuse")
        ),
    ),
)
def decode_inputs(
    token: Tensor,
    position: Tensor,
    source: Tensor,
    padding: Tensor,
    tables: Tensor,
    page_size: int,
    embeddings: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row r feeds token[s] (i64) at position[s] (i32) of request s = source[r] (i64), whose pages are tables[:, s].

    -> embeddings' rows [rows, hidden], positions i32 [rows], lengths (positions + 1) i32 [rows], slots i64 [groups,
    rows] as kv_append takes them, the requests' tables i32 [groups, rows, columns]. padding (i64 [rows]) is added to a
    row's slots.
    """
    positions = position[source]
    columns = (positions // page_size).long()
    slots = torch.add(positions % page_size + padding, tables[:, source, columns], alpha=page_size)
    return embeddings[token[source]], positions, positions + 1, slots, tables.index_select(1, source)
