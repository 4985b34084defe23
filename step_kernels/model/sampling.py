"""How tokens are chosen: greedy, or by temperature, top-k and top-p. The choice itself is ops.choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.choose import AT_ONCE, hash_, scale

MOST_KEPT = 1024  # tokens that top_k or top_p may keep: so many are sorted, not the whole vocabulary
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
        """What a choice takes at least: 0 the best, 1 a draw from all, 2 a draw from the kept."""
        return 0 if self.temperature == 0 else 1 if self.top_p == 1 and self.top_k == 0 else 2

    def key(self, request: int) -> int:
        """32 bits that stand for the seed and the request."""
        key = 0x9E3779B9  # any word but 0, which the hash leaves at 0
        for word in (self.seed & _WORD, self.seed >> 32 & _WORD, request):
            key = int(hash_(torch.tensor(key ^ word)))
        return key


def least_kept(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """f32 [rows, vocab] and f32, f32, i64 [rows] -> f32 [rows], the lowest logit that top_k and top_p keep."""
    rows = max(1, AT_ONCE // logits.shape[-1])
    if len(logits) > rows:
        return torch.cat(
            [least_kept(*part) for part in zip(*(t.split(rows) for t in (logits, temperature, top_p, top_k)))]
        )
    best, factor = logits.topk(min(MOST_KEPT, logits.shape[-1])).values, scale(temperature)[:, None]
    total = ((logits - best[:, :1]) * factor).logsumexp(-1, keepdim=True)
    mass = ((best - best[:, :1]) * factor - total).exp()
    above = mass.cumsum(-1) - mass
    limit = torch.where(top_k == 0, best.shape[-1], top_k)[:, None]
    rank = torch.arange(best.shape[-1], device=logits.device)
    is_kept = ((above < top_p[:, None]) | (top_p == 1)[:, None]) & (rank < limit)
    least = best.gather(-1, is_kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))[:, 0]
    return least.masked_fill_((top_p == 1) & (top_k == 0), -torch.inf)
