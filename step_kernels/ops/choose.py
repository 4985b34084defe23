"""The next token of each row of logits: the best, or a draw with noise that is counted, not drawn.

A draw is the Gumbel-max of the scores. The noise of a token is a hash of the request's key, the position and the
token id, so it depends neither on the batch nor on what was drawn before, and a graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, define, expect, lazy

AT_ONCE = 1 << 22  # logits: 34 MB of noise, which stays in an L2 cache of 50 MB
_INTEGERS = (torch.int32, torch.int64)
_LEAST_TEMPERATURE = 1e-6  # below, logits that differ at all leave only the best
_WORD = 0xFFFFFFFF


def _check(
    logits, positions, requests, temperature=None, key=None, least=None, targets=None, token=None, position=None
):
    expect("logits", logits, (None, None), (torch.float32, torch.float64))
    rows, vocab = logits.shape
    if not 0 < vocab < 1 << 30:
        raise ValueError(f"logits: got {vocab} tokens to choose from, wanted 1 to 2^30 - 1")
    expect("positions", positions, (rows,), _INTEGERS)
    expect("requests", requests, (rows,), torch.int64)
    if temperature is not None:
        expect("temperature", temperature, (None,), torch.float32)
        expect("key", key, tuple(temperature.shape), torch.int64)
    if least is not None:
        expect("least", least, (rows,), logits.dtype)
    if targets is not None:
        expect("targets", targets, (rows,), torch.int64)
        expect("token", token, (None,), torch.int64)
        expect("position", position, tuple(token.shape), torch.int32)


def _fake(logits, positions, requests, *args):
    return torch.empty_like(requests, memory_format=torch.contiguous_format)


@define(
    check=_check,
    fake=_fake,
    kernels=(Kernel("cuda", lazy("cuda.choose.launch"), (90, 129), "cuda.bindings", lazy("cuda.choose.refuse")),),
    mutates=("token", "position"),
)
def choose(
    logits: Tensor,
    positions: Tensor,
    requests: Tensor,
    temperature: Tensor | None = None,
    key: Tensor | None = None,
    least: Tensor | None = None,
    targets: Tensor | None = None,
    token: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """f32 [rows, vocab] -> i64 [rows], each row's token at its position; ties go to the lowest id, NaN is the best.

    Without `temperature` the best logit. With it (f32 [any]) and `key` (32 bits in i64 [any]) row r draws as the two
    say at requests[r], from logits not below least[r]; temperature 0 takes the best. With `targets` (i64 [rows]) the
    token and its position are left there, in token (i64 [any]) and position (i32 [any]).
    """
    if temperature is None:
        chosen = logits.argmax(-1)
    else:
        chosen = _drawn(logits, positions, temperature[requests], key[requests], least)
    if targets is not None:
        token.index_copy_(0, targets, chosen)
        position.index_copy_(0, targets, positions.to(position.dtype))
    return chosen


def _drawn(logits: Tensor, positions: Tensor, temperature: Tensor, key: Tensor, least: Tensor | None) -> Tensor:
    vocabulary, rows = vocabulary_noise(logits.shape[-1], logits.device), max(1, AT_ONCE // logits.shape[-1])
    chosen = []
    for at in range(0, len(logits), rows):
        part = slice(at, at + rows)
        noise = gumbel(key[part], positions[part], vocabulary).mul_((temperature[part] > 0)[:, None])
        scores = noise + logits[part] * scale(temperature[part])[:, None]
        if least is not None:
            scores.masked_fill_(logits[part] < least[part, None], -torch.inf)
        chosen.append(scores.argmax(-1))
    return torch.cat(chosen) if chosen else torch.zeros_like(key)


def scale(temperature: Tensor) -> Tensor:
    """What logits are multiplied by: 1 / temperature, and 1 at temperature 0."""
    return torch.where(temperature > 0, 1 / temperature.clamp(min=_LEAST_TEMPERATURE), 1.0)


def gumbel(key: Tensor, position: Tensor, vocabulary: Tensor) -> Tensor:
    """Gumbel noise f32 [rows, vocab] of keys (i64) and positions (integer), both [rows]."""
    bits = hash_(vocabulary ^ hash_(key ^ position)[:, None])
    # uniform in (0, 1), finest near 0, where the highest noise comes from; at 1 the logarithm would be infinite
    uniform = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def vocabulary_noise(size: int, device: torch.device) -> Tensor:
    """i64 [size]: a hash of every token id, so that no two rows' noise is the same but shifted."""
    return hash_(torch.arange(1, size + 1, device=device))


def hash_(x: Tensor) -> Tensor:
    """Mix 32 bits held in i64, in place (Wellons's lowbias32). Products wrap, which leaves their low 32 bits right."""
    x ^= x >> 16
    x.mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    x.mul_(0x846CA68B).bitwise_and_(_WORD)
    x ^= x >> 16
    return x
