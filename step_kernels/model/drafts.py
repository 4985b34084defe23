"""Drafts of the MTP layers: each depth guesses one token more, from the hidden states of the depth above."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import choose
from .cache import PagedCache, upload


class Drafts:
    """What the draft layers need of each of a cache's requests, on the device, and the drafts they make of it.

    Where a request's next token is fed at position p, a round computes the items p - d - 1 to p - 1 of each of the d
    depths, its own drafts standing for the tokens past p. An item that no later round computes again saw none of them,
    or only such as were kept. Before position d + 1 the items are 0 to d; those from p on are computed again before
    anything attends to them.
    """

    def __init__(self, model, cache: PagedCache, depths: int):
        self.model, self.cache, self.layers = model, cache, model.mtp[:depths]
        self.fed = depths + 1  # tokens of a request in a round, and items of a depth
        self.ahead = torch.arange(self.fed, dtype=torch.int32, device=model.device)
        # Embeddings of tokens and the trunk's hidden states lie at their position modulo `ring`: a round writes `fed`
        # and reads as many before them. One request more, for padding rows.
        self.ring = 2 * self.fed
        shape = 2, (cache.requests + 1) * self.ring, model.config.hidden_size
        self.embeddings, self.hidden = torch.zeros(shape, dtype=model.dtype, device=model.device)

    def prefill(self, rows: list[int], ends: list[int], embeddings: list[Tensor], hidden: Tensor, context) -> None:
        """The items of a step that fed tokens of prompts, those of rows[i] up to position ends[i].

        hidden: the trunk's, [tokens, hidden]. embeddings: each row's [n + d, hidden], of its n tokens and the d behind
        them; any behind the prompt, since the first round computes those items again.
        """
        counts = [len(x) - len(self.layers) for x in embeddings]
        begin, sources, places = 0, [], []
        for row, end, count in zip(rows, ends, counts):
            last = min(count, self.fed)
            sources += range(begin + count - last, begin + count)
            places += [row * self.ring + position % self.ring for position in range(end - last, end)]
            begin += count
        sources, places = (upload(torch.tensor(values), hidden.device) for values in (sources, places))
        self.hidden.index_copy_(0, places, hidden[sources])
        fed = torch.cat([x[:n] for x, n in zip(embeddings, counts)])
        self.embeddings.index_copy_(0, places, fed[sources])
        for depth, layer in enumerate(self.layers):
            fed = torch.cat([x[1 + depth : 1 + depth + n] for x, n in zip(embeddings, counts)])
            hidden = layer(fed, hidden, context)

    def take(self, requests: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Tokens i64 [rows, n] of the requests (i64 [rows]) that stand at these positions (integer [rows, n])."""
        self._write(self.embeddings, requests, positions, self.model.embed_tokens[tokens.flatten()])

    def seen(self, requests: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """The trunk's hidden states [rows * n, hidden] of the requests (i64 [rows]) at these positions ([rows, n])."""
        self._write(self.hidden, requests, positions, hidden)

    def feed(self, requests: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [rows * n, hidden] of what stands at these positions (integer [rows, n])."""
        return self.embeddings[self._places(requests, positions)]

    def draft(self, source: Tensor, target: Tensor, position: Tensor, padding: Tensor, query_start: Tensor) -> Tensor:
        """Drafts i64 [rows, d] of what follows each row's next token, at `position` (i32 [rows]).

        A row reads the state of request `source` and leaves its drafts in that of `target` (i64 [rows]); padding and
        query_start as PagedCache.next_spans takes them. Nothing here is decided on the host.
        """
        first = (position - self.fed).clamp_(min=0)
        items = first[:, None] + self.ahead
        context = self.cache.next_spans(source, items, padding, query_start)
        last = (query_start[:-1] + (position - 1 - first)).long()
        hidden, drafts = self.hidden[self._places(source, items)], []
        for depth, layer in enumerate(self.layers):
            hidden = layer(self.feed(source, items + (1 + depth)), hidden, context)
            drafts.append(choose(layer.logits(hidden[last]), position, source))
            self.take(target, (position + (1 + depth))[:, None], drafts[-1][:, None])
        return torch.stack(drafts, 1)

    def _places(self, requests: Tensor, positions: Tensor) -> Tensor:
        return (requests[:, None] * self.ring + positions % self.ring).flatten()

    def _write(self, state: Tensor, requests: Tensor, positions: Tensor, values: Tensor) -> None:
        state.index_copy_(0, self._places(requests, positions), values)


@dataclass
class DraftStats:
    """Drafts offered and kept, by depth."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, depths: int, kept: int) -> None:
        """A request's round in which the first `kept` of `depths` drafts were kept."""
        for depth in range(depths):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < kept
