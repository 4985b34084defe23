"""The paged KV cache: full layers keep every page, sliding layers (and the MTP layers) only their window's.

A page holds `page_size` positions of one request in every layer of its group; the group's block table says
which page. Page tensors are [pages, kv_heads, page_size, head_dim], in e4m3 or the model's dtype. Tables are
kept on the host and on the device; a row is copied there, without waiting, when its request's pages change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import decode_inputs, kv_append, paged_attention
from .attention import Attention
from .config import LayerConfig, StepConfig

PAGE_SIZE = 64
CHUNK = 4096  # prompt tokens a prefill step


class PagedCache:
    """Room for `requests` sequences of up to `max_length` positions, at most `chunk` new ones of each a step.

    Every request has its pages from the start, unless `tokens` says how many positions the full layers hold in
    all: then a request has pages from `admit` to `free`, and `chunk` bounds the sum of a step's new positions,
    of which no two requests may be in the middle of a prompt.
    """

    def __init__(
        self,
        config: StepConfig,
        requests: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mtp_depths: int = 0,
        chunk: int = CHUNK,
        page_size: int = PAGE_SIZE,
        tokens: int | None = None,
    ):
        layers = config.layers[: config.num_layers + mtp_depths]
        columns, new = -(-max_length // page_size), -(-chunk // page_size)
        self.requests, self.max_length, self.page_size, self.device = requests, max_length, page_size, device
        windows = list(dict.fromkeys(layer.window for layer in layers))
        tables = torch.full((len(windows), requests, columns), -1, dtype=torch.int32)
        self.tables = tables.to(device)  # the same tensor on a CPU
        self.groups: dict[int | None, _Group] = {}
        for window, table, on_device in zip(windows, tables, self.tables):
            if window is None:
                keep, alive = None, columns
                pages = requests * columns if tokens is None else -(-tokens // page_size)
            else:
                # drafting layers begin mtp_depths + 1 positions behind the trunk again
                keep = window + mtp_depths if mtp_depths else window - 1
                alive = min(columns, (keep + mtp_depths - 1) // page_size + 2)  # of decoding
                pages = requests * (min(columns, alive + new) if tokens is None else alive)
                pages += 0 if tokens is None else min(requests * (columns - alive), new + 1)
            self.groups[window] = _Group(table, on_device, pages, keep, alive, page_size)
        self.layers = [self._allocate(layer, dtype) for layer in layers]
        if tokens is None:
            for request in range(requests):
                self.admit(request, max_length)

    def _allocate(self, layer: LayerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = (self.groups[layer.window].pages, layer.kv_heads, self.page_size, layer.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in "kv")
        return k, v

    @property
    def bytes(self) -> int:
        """Device memory the pages take."""
        return sum(t.numel() * t.itemsize for pair in self.layers for t in pair)

    @property
    def longest(self) -> int:
        """Positions of the longest request that could be admitted to the empty cache."""
        full = self.groups.get(None)
        return self.max_length if full is None else min(self.max_length, full.pages * self.page_size)

    def admit(self, request: int, length: int) -> bool:
        """Give a request the full layers' pages for `length` positions; False if too few are free now."""
        full = self.groups.get(None)
        if full is None:
            return True
        if -(-length // self.page_size) > len(full.unused):
            return False
        full.take(request, length)
        return True

    def free(self, request: int) -> None:
        """Take all of a request's pages back. Steps launched before still find them as they were."""
        for group in self.groups.values():
            group.release(request, group.last[request])
            group.first[request] = group.last[request] = 0
            group.table[request] = -1

    def settle(self, request: int, begin: int, end: int) -> None:
        """Fix the pages of positions begin to end, fed one by one: a sliding layer's recur in a ring."""
        for group in self.groups.values():
            group.drop(request, begin)
            group.ring(request, end)
            group.copy_rows()

    def tokens(self, starts: list[int], counts: list[int]) -> CachedTokens:
        """The context of a step: request r brings counts[r] tokens at positions starts[r] and on (0: none)."""
        active = [r for r, count in enumerate(counts) if count]
        starts, counts = ([values[r] for r in active] for values in (starts, counts))
        positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts)])
        owner = torch.repeat_interleave(torch.tensor(active), torch.tensor(counts))
        lengths = torch.tensor([start + count for start, count in zip(starts, counts)], dtype=torch.int32)
        query_start = torch.tensor([0, *counts]).cumsum(0).int()
        rows, tensors = upload(torch.tensor(active), self.device), {}
        for window, group in self.groups.items():
            for request, start in zip(active, starts):
                group.drop(request, start)
            for request, length in zip(active, lengths.tolist()):
                group.take(request, length)
            group.copy_rows()
            slots = group.table[owner, positions // self.page_size] * self.page_size + positions % self.page_size
            tensors[window] = upload(slots, self.device), group.on_device.index_select(0, rows)
        return CachedTokens(self, *(upload(t, self.device) for t in (positions, lengths, query_start)), tensors)

    def next_tokens(
        self, rows: Tensor, token: Tensor, position: Tensor, padding: Tensor, query_start: Tensor, embeddings: Tensor
    ) -> tuple[Tensor, CachedTokens]:
        """Embeddings and the context of one token each of the requests `rows` (i64), all on the device.

        `token` (i64) and `position` (i32) hold what every request feeds next, and where. `padding` (i64) is 0, or
        -2^30 for a row whose keys and values are not to be written; query_start (i32) is 0, 1, 2 and so on. Nothing
        here is decided on the host. The pages are those that `settle` fixed.
        """
        fed = decode_inputs(token, position, rows, padding, self.tables, self.page_size, embeddings)
        hidden, positions, lengths, slots, tables = fed
        groups = dict(zip(self.groups, zip(slots, tables)))
        return hidden, CachedTokens(self, positions, lengths, query_start, groups)

    def next_spans(self, rows: Tensor, positions: Tensor, padding: Tensor, query_start: Tensor) -> CachedTokens:
        """The context of tokens of the requests `rows` (i64) at these positions (i32 [rows, n], each row's in order).

        padding as next_tokens takes it; query_start (i32) is 0, n, 2n and so on.
        """
        pages = self.tables[:, rows[:, None], (positions // self.page_size).long()]
        slots = torch.add(positions % self.page_size + padding[:, None], pages, alpha=self.page_size).flatten(1)
        groups = dict(zip(self.groups, zip(slots, self.tables.index_select(1, rows))))
        return CachedTokens(self, positions.flatten(), positions[:, -1] + 1, query_start, groups)


class CachedTokens:
    """The context with a cache: tokens of some requests in a row, each request's in order."""

    def __init__(self, cache: PagedCache, positions: Tensor, lengths: Tensor, query_start: Tensor, groups: dict):
        self.cache, self.groups = cache, groups
        self.positions, self.lengths, self.query_start = positions, lengths, query_start

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """q [tokens, heads, d], k and v alike, gate [tokens, heads] -> q's shape; k and v join the cache."""
        k_cache, v_cache = self.cache.layers[attention.index]
        window = attention.layer.window
        slots, table = self.groups[window]
        scales = attention.k_scale, attention.v_scale
        q = kv_append(
            q, k, v, attention.q_norm, attention.k_norm, attention.eps, attention.inv_freq, self.positions, slots,
            k_cache, v_cache, *scales,
        )  # fmt: skip
        return paged_attention(q, k_cache, v_cache, *scales, table, self.lengths, self.query_start, window, gate)


class _Group:
    """Pages of the layers that share a window, and the table request x page number -> page (i32, -1: none).

    A request owns the pages of its columns first to last; later entries of `ring` repeat them.
    """

    def __init__(self, table: Tensor, on_device: Tensor, pages: int, keep: int | None, alive: int, page_size: int):
        self.pages, self.keep, self.alive, self.page_size = pages, keep, alive, page_size
        self.table, self.on_device = table, on_device
        self.unused = list(range(pages - 1, -1, -1))
        self.first, self.last = [0] * len(table), [0] * len(table)
        self.changed: set[int] = set()

    def drop(self, request: int, begin: int) -> None:
        """Release the pages that no token from position `begin` on can see."""
        if self.keep is not None:
            self.release(request, max(self.first[request], (begin - self.keep) // self.page_size))

    def release(self, request: int, first: int) -> None:
        """Release the pages of the columns before `first`."""
        end = min(first, self.last[request])
        self.unused += self.table[request, self.first[request] : end].flip(0).tolist()
        self.table[request, self.first[request] : end] = -1
        self.first[request], self.last[request] = first, max(first, self.last[request])

    def take(self, request: int, end: int) -> None:
        """Have pages for the positions before `end`."""
        last, column = self.last[request], -(-end // self.page_size)
        if column <= last:
            return
        if column - last > len(self.unused):
            raise RuntimeError(f"cache: request {request} needs {column - last} pages, {len(self.unused)} are free")
        pages = [self.unused.pop() for _ in range(last, column)]
        self.table[request, last:column] = torch.tensor(pages, dtype=torch.int32)
        self.last[request] = column
        self.changed.add(request)

    def ring(self, request: int, end: int) -> None:
        """Let as many pages as a token can see recur up to position `end`."""
        first = self.first[request]
        self.take(request, min(end, (first + self.alive) * self.page_size))
        last = self.last[request]
        later = torch.arange(last, max(last, -(-end // self.page_size)))
        self.table[request, last : last + len(later)] = self.table[request, first + (later - first) % (last - first)]
        self.changed.add(request)

    def copy_rows(self) -> None:
        """Bring the rows that changed to the device."""
        if self.on_device.is_cuda:
            for request in self.changed:
                self.on_device[request].copy_(self.table[request].pin_memory(), non_blocking=True)
        self.changed.clear()


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, through pinned memory: the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
