"""Requests that begin and end at different times: admission, prompts in chunks, tokens, and the end."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .cache import PagedCache, upload
from .decoding import Chosen, Decoder
from .drafts import DraftStats
from .sampling import Sampling


class Request:
    """A prompt and what follows it. `length`: positions that it may take; `images`: arguments of Step3p7.embed."""

    def __init__(self, model, number: int, prompt: list[int], *, new: int, stop: set[int], sampling: Sampling,
                 images: dict | None = None, depths: int = 0):  # fmt: skip
        model.embed(torch.tensor([min(prompt), max(prompt)]))  # which refuses ids that are none
        self.number, self.prompt, self.limit, self.stop, self.sampling = number, len(prompt), new, stop, sampling
        self.tokens = list(prompt)
        self.places, self.features = [], None  # of image tokens in the prompt, and what stands there instead
        if images:
            self.places = [i for i, token in enumerate(prompt) if token == model.config.image_token_id]
            self.features = model.embed(torch.tensor([prompt[i] for i in self.places], dtype=torch.long), **images)
        self.depths, self.seen = depths, 0  # of drafts; tokens of the prompt that the trunk has seen
        self.row = None  # of the cache, once admitted
        self.new = self.unread = 0  # tokens that the host knows, and steps of one or more that it has yet to read
        self.finished = False

    @property
    def length(self) -> int:
        # a round may begin up to `depths` tokens past the last one, where one is unread, and feeds as many drafts
        return self.prompt + self.limit + 2 * self.depths

    @property
    def is_decoding(self) -> bool:
        return self.seen == self.prompt and not self.finished

    def keep(self, token: int) -> None:
        """Take a chosen token."""
        self.new += 1
        self.finished = self.new == self.limit or token in self.stop

    def embed(self, model, begin: int, end: int) -> Tensor:
        """Embeddings [end - begin, hidden] of the prompt and its image features; behind the prompt any."""
        tokens = self.tokens[begin:end]
        tokens += self.tokens[-1:] * (end - begin - len(tokens))
        x = model.embed_tokens[upload(torch.tensor(tokens), model.device)]
        at = [n for n, place in enumerate(self.places) if begin <= place < end]
        if at:
            rows = upload(torch.tensor([self.places[n] - begin for n in at]), model.device)
            x.index_copy_(0, rows, self.features[at[0] : at[-1] + 1])
        return x


class Batch:
    """Requests in a cache, each with a row of its tables; those for which there is no room wait their turn."""

    def __init__(
        self, model, cache: PagedCache, decoder: Decoder, requests: Iterable[Request], chunk: int, stats: DraftStats
    ):
        self.model, self.cache, self.decoder, self.chunk, self.stats = model, cache, decoder, chunk, stats
        self.waiting = deque(requests)
        self.requests: list[Request | None] = [None] * cache.requests  # by row; a finished one until its row is taken
        self.prefilling: deque[int] = deque()  # rows

    @property
    def is_done(self) -> bool:
        return not self.waiting and all(r is None or r.finished for r in self.requests)

    def admit(self) -> None:
        """Let requests in, in order, as far as there are rows and pages."""
        for row, request in enumerate(self.requests):
            if request and not request.finished:
                continue
            if not self.waiting or not self.cache.admit(row, self.waiting[0].length):
                return
            request = self.requests[row] = self.waiting.popleft()
            request.row = row
            self.decoder.admit(row, request.sampling, request.number)
            self.prefilling.append(row)

    def prefill(self) -> tuple[list[Request], Chosen] | None:
        """Feed up to `chunk` tokens of prompts, first come first served; first tokens of the prompts that end here."""
        counts, starts, room = [0] * len(self.requests), [0] * len(self.requests), self.chunk
        for row in self.prefilling:
            starts[row] = self.requests[row].seen
            counts[row] = min(room, self.requests[row].prompt - starts[row])
            room -= counts[row]
        if not any(counts):
            return None
        fed = [(r, start, start + count) for r, start, count in zip(self.requests, starts, counts) if count]
        embeddings = [request.embed(self.model, begin, end + request.depths) for request, begin, end in fed]
        context = self.cache.tokens(starts, counts)
        x = torch.cat([x[: end - begin] for x, (_, begin, end) in zip(embeddings, fed)])
        hidden = self.model.trunk(x, context)
        for request, _, end in fed:
            request.seen = end
        if self.decoder.drafts:
            rows, ends = zip(*((request.row, end) for request, _, end in fed))
            self.decoder.drafts.prefill(rows, ends, embeddings, hidden, context)
        last = list(itertools.accumulate(end - begin for _, begin, end in fed))
        ended = [(request, end - 1) for (request, _, _), end in zip(fed, last) if request.seen == request.prompt]
        if not ended:
            return None
        for request, _ in ended:
            self.prefilling.remove(request.row)
            request.unread = 1
            self.cache.settle(request.row, request.prompt, request.length)
        requests = [request for request, _ in ended]
        logits = self.model.logits(hidden[upload(torch.tensor([at for _, at in ended]), hidden.device)])
        return requests, self.decoder.start([r.row for r in requests], logits, [r.prompt for r in requests])

    def decode(self) -> tuple[list[Request], Chosen] | None:
        """Launch one more step of all whose prompts have been fed and that may have more tokens."""
        active = [r for r in self.requests if r and r.is_decoding and r.new + r.unread < r.limit]
        if not active:
            return None
        shortest = min(active, key=lambda request: request.prompt + request.new + request.unread)
        for request in active:
            request.unread += 1
        return active, self.decoder.step([request.row for request in active], shortest.row)

    def read(self, requests: list[Request], chosen: Chosen) -> Iterator[tuple[int, int]]:
        """(request, token) of a launch. What was launched for a request before its stop was known is dropped."""
        for request, tokens in zip(requests, chosen.lists()):
            request.unread -= 1
            if request.finished:
                continue
            before = request.new
            for token in tokens:
                self.keep(request, token)
                yield request.number, token
                if request.finished:
                    break
            if before:
                self.stats.count(request.depths, min(len(tokens) - 1, request.new - before))

    def keep(self, request: Request, token: int) -> None:
        """Take a chosen token; a request that it ends gives its pages back."""
        request.keep(token)
        if request.finished:
            self.cache.free(request.row)

    def close(self) -> None:
        """Give all pages back."""
        for row in range(len(self.requests)):
            self.cache.free(row)
