"""The paged KV cache: full layers keep every page, sliding layers (and the MTP layers) only their window's.

A page holds `page_size` positions of one request in every layer of its group; the group's block table says
which page. Page tensors are [pages, kv_heads, page_size, head_dim], in e4m3 or the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import kv_append, paged_attention
from .attention import Attention
from .config import LayerConfig, StepConfig


class PagedCache:
    """Room for `requests` sequences of up to `max_length` positions, at most `chunk` new ones a step."""

    def __init__(
        self,
        config: StepConfig,
        requests: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mtp_depths: int = 0,
        chunk: int = 2048,
        page_size: int = 64,
    ):
        layers = config.layers[: config.num_layers + mtp_depths]
        pages = -(-max_length // page_size)
        self.requests, self.device = requests, device
        self.groups: dict[int | None, _Group] = {}
        for layer in layers:
            if layer.window not in self.groups:
                # A drafting layer restarts up to mtp_depths positions behind the trunk.
                keep = None if layer.window is None else layer.window - 1 + mtp_depths
                needed = pages if keep is None else min(pages, -(-(keep + chunk) // page_size) + 1)
                self.groups[layer.window] = _Group(requests, pages, needed, keep, page_size)
        self.layers = [self._allocate(layer, page_size, dtype) for layer in layers]

    def _allocate(self, layer: LayerConfig, page_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = (self.groups[layer.window].pages, layer.kv_heads, page_size, layer.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in "kv")
        return k, v

    @property
    def bytes(self) -> int:
        """Device memory the pages take."""
        return sum(t.numel() * t.itemsize for pair in self.layers for t in pair)

    def tokens(self, starts: list[int], counts: list[int]) -> CachedTokens:
        """The context of a step: request r brings counts[r] tokens at positions starts[r] and on (0: none)."""
        spans = list(zip(starts, counts))
        positions = torch.cat([torch.arange(start, start + count) for start, count in spans])
        owner = torch.repeat_interleave(torch.arange(self.requests), torch.tensor(counts))
        lengths = torch.tensor([start + count if count else 0 for start, count in spans], dtype=torch.int32)
        query_start = torch.tensor([0, *counts]).cumsum(0).int()
        group_tensors = {}
        for window, group in self.groups.items():
            for request, (start, count) in enumerate(spans):
                if count:
                    group.reserve(request, start, start + count)
            page = group.table[owner, positions // group.page_size].long()
            slots = page * group.page_size + positions % group.page_size
            group_tensors[window] = slots.to(self.device), group.table.to(self.device, copy=True)
        return CachedTokens(self, positions, lengths, query_start, group_tensors)

    def free(self, request: int) -> None:
        """Give the pages of a finished request back."""
        for group in self.groups.values():
            group.release(request, 0, group.table.shape[1])


class CachedTokens:
    """The context with a cache: tokens of all requests in a row, each request's in order."""

    def __init__(self, cache: PagedCache, positions: Tensor, lengths: Tensor, query_start: Tensor, groups: dict):
        self.cache, self.groups = cache, groups
        self.positions, self.lengths, self.query_start = (t.to(cache.device) for t in (positions, lengths, query_start))

    def tensors(self) -> list[Tensor]:
        """All that a step depends on besides its tokens, in a fixed order."""
        return [self.positions, self.lengths, self.query_start, *(t for pair in self.groups.values() for t in pair)]

    def clone(self) -> CachedTokens:
        """The same step in tensors of its own."""
        groups = {window: (slots.clone(), table.clone()) for window, (slots, table) in self.groups.items()}
        return CachedTokens(self.cache, self.positions.clone(), self.lengths.clone(), self.query_start.clone(), groups)

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
    """Pages of the layers that share a window, and the table request x page number -> page (i32, -1: none)."""

    def __init__(self, requests: int, columns: int, pages_each: int, keep: int | None, page_size: int):
        self.pages, self.keep, self.page_size = requests * pages_each, keep, page_size
        self.table = torch.full((requests, columns), -1, dtype=torch.int32)
        self.unused = list(range(self.pages - 1, -1, -1))
        self.first = [0] * requests  # pages below have been released

    def reserve(self, request: int, begin: int, end: int) -> None:
        """Have pages for the positions begin to end, and drop those that no token from `begin` on can see."""
        if self.keep is not None:
            first = max(self.first[request], (begin - self.keep) // self.page_size)
            self.release(request, self.first[request], first)
            self.first[request] = first
        row = self.table[request]
        for column in range(begin // self.page_size, -(-end // self.page_size)):
            if row[column] < 0:
                row[column] = self.unused.pop()

    def release(self, request: int, first: int, last: int) -> None:
        row = self.table[request]
        for column in range(first, last):
            if row[column] >= 0:
                self.unused.append(int(row[column]))
                row[column] = -1
