"""Launcher of csrc/smxx_decode_inputs.cu."""

from __future__ import annotations

from torch import Tensor

from .driver import Kernel

KERNEL = Kernel("smxx_decode_inputs", "smxx_decode_inputs", "P" * 11 + "qiiiii", dependent=True)
THREADS, ITEMS = 256, 1024  # of a block
_WORD = 16  # bytes of an embedding that are copied together
_MOST_ITEMS = ITEMS * 65535  # of a row: blocks that a grid has


def refuse(
    token: Tensor, position: Tensor, source: Tensor, padding: Tensor, tables: Tensor, page_size: int, embeddings: Tensor
) -> str | None:  # fmt: skip
    """Why the kernel does not take the op's arguments, or None."""
    size, (groups, _, columns) = embeddings.itemsize, tables.shape
    past = embeddings.data_ptr() % _WORD
    if embeddings.stride(1) != 1 or embeddings.stride(0) * size % _WORD or embeddings.shape[1] * size % _WORD or past:
        where = f"{embeddings.shape[1]} of {size} bytes, strides {embeddings.stride()}, {past} bytes past one"
        return f"takes embeddings in whole words of {_WORD} bytes, got {where}"
    if embeddings.shape[1] * size // _WORD + groups * columns > _MOST_ITEMS:
        return f"takes tables of at most {_MOST_ITEMS} entries a row, got {groups * columns}"


def launch(
    token: Tensor, position: Tensor, source: Tensor, padding: Tensor, tables: Tensor, page_size: int, embeddings: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ops.decode_inputs."""
    rows, (groups, requests, columns) = len(source), tables.shape
    hidden = embeddings.new_empty(rows, embeddings.shape[1])
    positions, lengths = position.new_empty(rows), position.new_empty(rows)
    slots, row_tables = token.new_empty(groups, rows), tables.new_empty(groups, rows, columns)
    words = hidden.shape[1] * hidden.itemsize // _WORD
    if rows:
        KERNEL.launch(
            (rows, -(-(words + groups * columns) // ITEMS) or 1, 1), THREADS,
            *(t.contiguous() for t in (token, position, source, padding, tables)), embeddings,
            hidden, positions, lengths, slots, row_tables, embeddings.stride(0) * embeddings.itemsize // _WORD,
            words, groups, requests, columns, page_size,
        )  # fmt: skip
    return hidden, positions, lengths, slots, row_tables
