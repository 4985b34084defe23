"""How well a model predicts text, reads digits and drafts tokens, through a KV cache in its own dtype or in FP8."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from step_kernels.model import Step3p7
from step_kernels.model.cache import PagedCache
from step_kernels.model.chat import Chat
from step_kernels.model.generation import DraftStats, generate
from step_kernels.model.image import prepare

from .digits import QUESTIONS, answer, picture

PROMPT, NEW = 64, 64  # tokens of a document before the drafts, and tokens to generate with them
ANSWER = 20  # tokens an answer may take, its end included
DOCUMENTS, PICTURES = 16, 64  # prefilled together


@dataclass(frozen=True)
class Text:
    """By document: how many tokens were predicted, their surprise in nats, how often the reference's top token was
    the top one, and KL(reference || model) of each token in nats."""

    counts: np.ndarray
    surprise: np.ndarray
    hits: np.ndarray
    kl: list[np.ndarray]

    @property
    def kl_sums(self) -> np.ndarray:
        return np.array([kl.sum() for kl in self.kl])


def prefill(model: Step3p7, kv_cache: str, rows: list[Tensor], room: int = 0) -> tuple[PagedCache, list[Tensor]]:
    """Embeddings [tokens, hidden] by request -> their cache, with room for more tokens, and their hidden states."""
    lengths, dtype = [len(row) for row in rows], torch.float8_e4m3fn if kv_cache == "fp8" else model.dtype
    cache = PagedCache(
        model.config, len(rows), max(lengths) + room, dtype=dtype, device=model.device, chunk=max(lengths)
    )
    hidden = model.trunk(torch.cat(rows), cache.tokens([0] * len(rows), lengths))
    return cache, list(hidden.split(lengths))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities [..., vocab] -> [...]."""
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def read_text(model: Step3p7, kv_cache: str, documents: list[list[int]]) -> list[Tensor]:
    """The trunk's hidden states [tokens, hidden] of each document."""
    hidden = []
    for part in _parts(documents, DOCUMENTS):
        hidden += prefill(model, kv_cache, [model.embed(torch.tensor(tokens)) for tokens in part])[1]
    return hidden


@torch.inference_mode()
def compare(documents: list[list[int]], reference: tuple, other: tuple) -> Text:
    """The two are a model and what it made of the documents; logits exist for a document at a time."""
    rows = []
    for i, tokens in enumerate(documents):
        p, q = (model.logits(hidden[i][:-1]).log_softmax(-1) for model, hidden in (reference, other))
        target = torch.tensor(tokens[1:], device=q.device)
        surprise = -q.gather(-1, target[:, None]).double().sum().item()
        hits = (p.argmax(-1) == q.argmax(-1)).sum().item()
        rows.append((len(target), surprise, hits, divergence(p, q).double().cpu().numpy()))
    counts, surprise, hits, kl = zip(*rows)
    return Text(np.array(counts), np.array(surprise), np.array(hits), list(kl))


@torch.inference_mode()
def greedy(model: Step3p7, kv_cache: str, rows: list[Tensor], new: int) -> list[list[int]]:
    """What generate() chooses after the embeddings of each request, without its stop; all are prefilled at once."""
    cache, hidden = prefill(model, kv_cache, rows, new)
    stop = torch.tensor(model.config.eos_ids, device=model.device)
    chosen = [model.logits(torch.stack([h[-1] for h in hidden])).argmax(-1)]
    stopped = torch.isin(chosen[0], stop)
    while len(chosen) < new and not stopped.all():
        context = cache.tokens([len(row) + len(chosen) - 1 for row in rows], [1] * len(rows))
        chosen.append(model.logits(model.trunk(model.embed_tokens[chosen[-1]], context)).argmax(-1))
        stopped |= torch.isin(chosen[-1], stop)
    ids = torch.stack(chosen, 1).tolist()
    return [list(itertools.takewhile(lambda token: token not in model.config.eos_ids, row)) for row in ids]


@torch.inference_mode()
def read_digits(
    model: Step3p7, kv_cache: str, chat: Chat, images: np.ndarray, labels: np.ndarray, each: int
) -> np.ndarray:
    """Whether the answer to each picture of `each` digits has the right words; digits left over are not shown."""
    right = []
    for part in _parts(range(len(labels) // each), PICTURES):
        rows = []
        for i in part:
            views = prepare(picture(images[i * each : (i + 1) * each]), model.config.vision)
            ids = torch.tensor(chat.prompt(QUESTIONS[i % len(QUESTIONS)], [views]))
            rows.append(model.embed(ids, views.global_view[None], views.crops, [len(views.crops)]))
        for i, ids in zip(part, greedy(model, kv_cache, rows, ANSWER)):
            said = chat.tokenizer.decode(ids, skip_special_tokens=True)
            right.append(answer(labels[i * each : (i + 1) * each]) in said)
    return np.array(right)


def count_drafts(model: Step3p7, kv_cache: str, documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Drafts offered and kept [documents, depths] in NEW greedy tokens after each document's first PROMPT.

    A draft is kept where it and all above it agree with the model. One deeper than the tokens still wanted is not
    counted: it has no chance.
    """
    prompts, stats, depths = [tokens[:PROMPT] for tokens in documents], DraftStats(), np.arange(len(model.mtp))
    counts, totals, owner = np.zeros((len(prompts), 2, len(depths)), int), np.zeros((2, len(depths)), int), 0
    given, before = [0] * len(prompts), [1] * len(prompts)  # tokens, and those before the round; the first has none
    # No graphs: as requests end at different rounds, nearly every step would capture one of its own size.
    tokens = generate(
        model, prompts, max_new_tokens=NEW, mtp=True, kv_cache=kv_cache, stop_ids=(), graphs=False, stats=stats
    )
    for request, _ in itertools.chain(tokens, [(0, None)]):  # once more, for the last round
        now = np.array([stats.drafted, stats.accepted])
        if (now != totals).any():  # a round is counted between its last token and the next one's first
            counts[owner] += (now - totals) * (depths < NEW - before[owner])
            totals, before[owner] = now, given[owner]
        given[request], owner = given[request] + 1, request
    return counts[:, 0], counts[:, 1]


def _parts(items, size: int) -> Iterator:
    return (items[i : i + size] for i in range(0, len(items), size))
