"""Decoding without the host: each step's tokens are chosen on the device and fed to the next step there.

With drafts a step is a round: it makes a request's drafts, feeds them behind its next token, chooses at each place, and
keeps a token as long as the draft before it was the one chosen there: the trunk alone would have chosen all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import choose
from .cache import PagedCache, upload
from .drafts import Drafts
from .graph import capture
from .sampling import Sampling, least_kept

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # rows of a graph; above, multiples of 32
_UNWRITTEN = -(1 << 30)  # makes any slot negative


class Decoder:
    """One more token for some of a cache's requests, in a CUDA graph for each bucket of rows if `graphs`.

    With `depths` of drafts, which the cache has layers for, up to so many more. A request's next token to feed, its
    position and how to choose lie on the device at its number in the cache.
    Rows of a graph beyond the step's requests repeat one of them, so that they visit no experts of their own,
    and write nothing. Graphs are captured at their first use.
    """

    def __init__(self, model, cache: PagedCache, graphs: bool, depths: int = 0):
        requests, device = cache.requests, model.device
        most = bucket(requests)
        self.model, self.cache, self.work = model, cache, [0] * requests
        # one request more: padding rows leave their token there
        self.token, self.top_k, self.key = torch.zeros(3, requests + 1, dtype=torch.int64, device=device)
        self.temperature, self.top_p = torch.zeros(2, requests + 1, device=device)
        self.position = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self.rows = torch.zeros(3, most, dtype=torch.int64, device=device)
        self.drafts = Drafts(model, cache, depths) if depths else None
        self.query_start = torch.arange(most + 1, dtype=torch.int32, device=device) * (1 + depths)
        self.uploaded: tuple | None = None
        self.graphs: dict[tuple[int, int], tuple] | None = {} if graphs else None
        self.pool = torch.cuda.graph_pool_handle() if graphs else None

    def admit(self, request: int, sampling: Sampling, number: int) -> None:
        """Choose this request's tokens so from now on; its draws are those of the `number`-th prompt."""
        self.work[request] = sampling.work
        self.temperature[request], self.top_p[request] = sampling.temperature, sampling.top_p
        self.top_k[request], self.key[request] = sampling.top_k, sampling.key(number)

    def start(self, requests: list[int], logits: Tensor, positions: list[int]) -> Chosen:
        """f32 [rows, vocab] of these requests -> their tokens at these positions, which are the next to feed."""
        rows, positions = (upload(torch.tensor(values), logits.device) for values in (requests, positions))
        tokens = self._choose(rows, logits, positions, self._work(requests), rows)
        if self.drafts:
            self.drafts.take(rows, positions[:, None], tokens[:, None])
        return Chosen(tokens)

    def feed(self, requests: list[int], tokens: Tensor, positions: list[int]) -> None:
        """Let these tokens (i64 [requests]) be the next to feed, at these positions."""
        rows = upload(torch.tensor(requests), tokens.device)
        positions = upload(torch.tensor(positions, dtype=torch.int32), tokens.device)
        self.token.index_copy_(0, rows, tokens)
        self.position.index_copy_(0, rows, positions)
        if self.drafts:
            self.drafts.take(rows, positions[:, None], tokens[:, None])

    def step(self, requests: list[int], repeated: int, rows: int | None = None) -> Chosen:
        """Feed each request's next token and choose the one after it; with drafts, those after it.

        Padding rows repeat the request `repeated`. `rows`: with padding; by default the requests' number, or its bucket
        where the step is a graph.
        """
        if rows is None:
            rows = len(requests) if self.graphs is None else bucket(len(requests))
        work = self._work(requests)
        if self.graphs is None:
            self._upload(requests, repeated, rows)
            return Chosen(self._step(rows, work)[: len(requests)])
        if (rows, work) not in self.graphs:
            self._upload([], repeated, rows)  # the run before the capture is to change nothing
            self.graphs[rows, work] = capture(self.model.device, lambda: self._step(rows, work), self.pool)
        self._upload(requests, repeated, rows)
        graph, tokens = self.graphs[rows, work]
        graph.replay()
        return Chosen(tokens[: len(requests)])

    def _upload(self, requests: list[int], repeated: int, rows: int) -> None:
        """What the rows read, what they write, and what hides their slots; only where it is not there already."""
        if self.uploaded == (rows, requests):
            return
        blank = rows - len(requests)
        source, target = requests + [repeated] * blank, requests + [self.cache.requests] * blank
        values = torch.tensor([source, target, [0] * len(requests) + [_UNWRITTEN] * blank])
        self.rows[:, :rows] = upload(values, self.rows.device)
        self.uploaded = rows, list(requests)

    def _step(self, rows: int, work: int) -> Tensor:
        """Nothing here is decided on the host. Tokens i64 [rows]; a round's [rows, 2 + depths], their number first."""
        source, target, padding = self.rows[:, :rows]
        if self.drafts:
            return self._round(source, target, padding, work)
        inputs = source, self.token, self.position, padding, self.query_start[: rows + 1], self.model.embed_tokens
        hidden, context = self.cache.next_tokens(*inputs)
        logits = self.model.logits(self.model.trunk(hidden, context))
        return self._choose(source, logits, context.lengths, work, target)

    def _round(self, source: Tensor, target: Tensor, padding: Tensor, work: int) -> Tensor:
        drafts, position = self.drafts, self.position[source]
        query_start = self.query_start[: len(source) + 1]
        drafted = drafts.draft(source, target, position, padding, query_start)
        places = position[:, None] + drafts.ahead
        context = self.cache.next_spans(source, places, padding, query_start)
        hidden = self.model.trunk(drafts.feed(source, places), context)
        drafts.seen(target, places, hidden)
        rows = source[:, None].expand_as(places).flatten()
        chosen = self._choose(rows, self.model.logits(hidden), (places + 1).flatten(), work).view(places.shape)
        drafts.take(target, places + 1, chosen)
        count = 1 + (chosen[:, :-1] == drafted).cumprod(1).sum(1)
        self.position.index_copy_(0, target, position + count.int())
        return torch.cat((count[:, None], chosen), 1)

    def _choose(
        self, rows: Tensor, logits: Tensor, positions: Tensor, work: int, targets: Tensor | None = None
    ) -> Tensor:
        """With `targets`, the tokens and their positions are the next to feed of the requests there."""
        least = None
        if work == 2:
            least = least_kept(logits, *(t[rows] for t in (self.temperature, self.top_p, self.top_k)))
        how = (self.temperature, self.key, least) if work else (None,) * 3
        fed = (None,) * 3 if targets is None else (targets, self.token, self.position)
        return choose(logits, positions, rows, *how, *fed)

    def _work(self, requests: list[int]) -> int:
        return max(self.work[request] for request in requests)


class Chosen:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.arrived = tokens, None
        if tokens.is_cuda:
            self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.tokens.copy_(tokens, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(tokens.device))

    def tolist(self) -> list[int]:
        """Waits for the step that chose them, not for later ones."""
        if self.arrived:
            self.arrived.synchronize()
        return self.tokens.tolist()

    def lists(self) -> list[list[int]]:
        """The same, each row's tokens in order: of a round those that it keeps."""
        rows = self.tolist()
        return [row[1 : 1 + row[0]] for row in rows] if self.tokens.dim() == 2 else [[token] for token in rows]


def bucket(rows: int) -> int:
    """The fewest rows of a graph that takes so many."""
    return next((b for b in BUCKETS if b >= rows), -(-rows // 32) * 32)
