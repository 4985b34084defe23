"""Choosing tokens on the device: greedy, or by temperature, top-k and top-p, with noise that is counted, not drawn.

A sample is the Gumbel-max of the kept logits. The noise of a token is a hash of the request's key, the position
and the token id, so it depends neither on the batch nor on what was drawn before, and a graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_KEPT = 1024  # tokens that top_k or top_p may keep: so many are sorted, not the whole vocabulary
_AT_ONCE = 1 << 22  # logits: 34 MB of noise, which stays in an L2 cache of 50 MB
_LEAST_TEMPERATURE = 1e-6  # below, logits that differ at all leave only the best
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen: temperature 0 is greedy, top_k 0 keeps all, top_p 1 too.

    top_k keeps the k best tokens, top_p the fewest best tokens that hold that share of the probability, at most
    1024; tokens that tie with the last kept are kept. Both together keep what both keep.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature, top_p: got {self.temperature}, {self.top_p}, wanted >= 0 and in (0, 1]")
        if not 0 <= self.top_k <= MOST_KEPT:
            raise ValueError(f"top_k: got {self.top_k}, wanted 0 (all) to {MOST_KEPT}")

    @property
    def work(self) -> int:
        """What `choose` must do at least: 0 the best, 1 a draw from all, 2 a draw from the kept."""
        return 0 if self.temperature == 0 else 1 if self.top_p == 1 and self.top_k == 0 else 2

    def key(self, request: int) -> int:
        """32 bits that stand for the seed and the request."""
        key = 0x9E3779B9  # any word but 0, which the hash leaves at 0
        for word in (self.seed & _WORD, self.seed >> 32 & _WORD, request):
            key = int(_hash_(torch.tensor(key ^ word)))
        return key


def choose(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    key: Tensor,
    position: Tensor,
    vocabulary: Tensor,
    work: int,
) -> Tensor:
    """f32 [rows, vocab] and f32, f32, i64, i64, integer [rows] -> i64 [rows], the token at each row's `position`.

    `vocabulary` is that of `vocabulary_noise`; `work` the highest of the rows' Sampling.work: no row's choice
    depends on the others'. Ties go to the lowest id.
    """
    if work == 0:
        return logits.argmax(-1)
    rows = max(1, _AT_ONCE // logits.shape[-1])
    if len(logits) > rows:
        parts = zip(*(t.split(rows) for t in (logits, temperature, top_p, top_k, key, position)))
        return torch.cat([choose(*part, vocabulary, work) for part in parts])
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]
    least = _least_kept(scores, top_p, top_k) if work == 2 else None
    noise = gumbel(key, position, vocabulary).mul_((temperature > 0)[:, None]).add_(scores)
    if least is not None:
        noise.masked_fill_(scores < least, -torch.inf)
    return noise.argmax(-1)


def _least_kept(scores: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """The lowest score that top_k and top_p keep [rows, 1]."""
    best = scores.topk(min(MOST_KEPT, scores.shape[-1])).values
    mass = (best - scores.logsumexp(-1, keepdim=True)).exp()
    above = mass.cumsum(-1) - mass
    limit = torch.where(top_k == 0, best.shape[-1], top_k)[:, None]
    rank = torch.arange(best.shape[-1], device=scores.device)
    is_kept = ((above < top_p[:, None]) | (top_p == 1)[:, None]) & (rank < limit)
    least = best.gather(-1, is_kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))
    return least.masked_fill_(((top_p == 1) & (top_k == 0))[:, None], -torch.inf)


def gumbel(key: Tensor, position: Tensor, vocabulary: Tensor) -> Tensor:
    """Gumbel noise f32 [rows, vocab] of keys (i64) and positions (integer), both [rows]."""
    bits = _hash_(vocabulary ^ _hash_(key ^ position)[:, None])
    # uniform in (0, 1), finest near 0, where the highest noise comes from; at 1 the logarithm would be infinite
    uniform = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def vocabulary_noise(size: int, device: torch.device) -> Tensor:
    """i64 [size]: a hash of every token id, so that no two rows' noise is the same but shifted."""
    return _hash_(torch.arange(1, size + 1, device=device))


def _hash_(x: Tensor) -> Tensor:
    """Mix 32 bits held in i64, in place (Wellons's lowbias32). Products wrap, which leaves their low 32 bits right."""
    x ^= x >> 16
    x.mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    x.mul_(0x846CA68B).bitwise_and_(_WORD)
    x ^= x >> 16
    return x
