"""The 5-gram baseline against dictionaries that follow Chen & Goodman's formulas word for word."""

import collections
import math

import numpy as np
import pytest

from bench import ngram

BOS = 7
VOCABULARY = 12


def corpus(seed: int, documents: int, most: int) -> list[np.ndarray]:
    """Documents of skewed random tokens: some n-grams come once, others often."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(documents):
        tokens = np.minimum(rng.geometric(0.35, rng.integers(1, most)), 9)
        found.append(np.concatenate([[BOS], tokens[tokens != BOS]]).astype(np.uint16))
    return found


def slow(train: list[np.ndarray], documents: list[np.ndarray]) -> list[float]:
    """The same probabilities from dictionaries, one token at a time."""
    raw = [collections.Counter() for _ in range(6)]
    for document in train:
        tokens = document.tolist()
        for end in range(1, len(tokens)):
            for order in range(1, min(5, end + 1) + 1):
                raw[order][tuple(tokens[end + 1 - order : end + 1])] += 1
    counts = [collections.Counter() for _ in range(6)]
    counts[5] = raw[5]
    for order in range(1, 5):
        for key in raw[order + 1]:
            counts[order][key[1:]] += 1
        for key, count in raw[order].items():
            if key[0] == BOS:
                counts[order][key] = count
    discounts = [None] * 6
    for order in range(1, 6):
        t = [list(counts[order].values()).count(k) for k in range(5)]
        discounts[order] = [0, 0.5, 1, 1.5]
        if t[1] and t[2] and t[3]:
            y = t[1] / (t[1] + 2 * t[2])
            estimate = [0, 1 - 2 * y * t[2] / t[1], 2 - 3 * y * t[3] / t[2], 3 - 4 * y * t[4] / t[3]]
            if min(estimate[1:]) > 0:
                discounts[order] = estimate

    def probability(history, token):
        order = len(history) + 1
        shorter = probability(history[1:], token) if history else 1 / (VOCABULARY - 1)
        after = {key[-1]: count for key, count in counts[order].items() if key[:-1] == history}
        if not after:
            return shorter
        total, lost = sum(after.values()), [discounts[order][min(count, 3)] for count in after.values()]
        own = after.get(token, 0)
        return (own - discounts[order][min(own, 3)]) / total + sum(lost) / total * shorter

    found = []
    for document in documents:
        tokens = document.tolist()
        found += [probability(tuple(tokens[max(0, end - 4) : end]), tokens[end]) for end in range(1, len(tokens))]
    return found


@pytest.mark.parametrize("seed, documents, most", [(0, 60, 40), (1, 5, 12), (2, 30, 3)])
def test_probabilities_are_those_of_the_dictionaries(seed, documents, most):
    train, held = corpus(seed, documents, most), corpus(seed + 100, 8, 30)
    found = ngram.probabilities(np.concatenate(train), held, VOCABULARY)
    np.testing.assert_allclose(found, slow(train, held), rtol=1e-12)


def test_discounts_follow_chen_and_goodman_where_rare_counts_exist():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 12, 6, 3, 5])
    y = 40 / (40 + 24)
    wanted = [0, 1 - 2 * y * 12 / 40, 2 - 3 * y * 6 / 12, 3 - 4 * y * 3 / 6]
    np.testing.assert_allclose(ngram._discounts(counts), wanted, rtol=1e-15)
    assert ngram._discounts(np.array([5, 9, 100])).tolist() == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("history", [[], [1], [1, 2, 1], [2, 1, 1, 3, 1], [11, 11, 11, 11], [1, 11, 2]])
def test_probabilities_of_all_tokens_sum_to_one_and_none_is_zero(history):
    train = np.concatenate(corpus(3, 40, 30))
    tokens = [token for token in range(VOCABULARY) if token != BOS]
    documents = [np.array([BOS, *history, token], np.uint16) for token in tokens]
    last = ngram.probabilities(train, documents, VOCABULARY).reshape(len(tokens), -1)[:, -1]
    assert last.sum() == pytest.approx(1, abs=1e-12)
    assert last.min() > 0 and train.max() < 11  # so 10 and 11 never occurred


def test_perplexity_is_that_of_the_first_511_tokens_after_bos():
    train, held = corpus(4, 40, 40), [np.array([BOS] + [1, 2] * 300, np.uint16), np.array([BOS, 1], np.uint16)]
    wanted = slow(train, [held[0][:512], held[1]])
    assert len(wanted) == 512
    found = ngram.perplexity(np.concatenate(train), held, VOCABULARY)
    assert found == pytest.approx(math.exp(-sum(map(math.log, wanted)) / 512), rel=1e-12)


def test_a_document_that_does_not_start_with_bos_is_named():
    train = np.array([BOS, 1, 2], np.uint16)
    with pytest.raises(
        ValueError, match=r"documents\[1\]: wanted BOS, 7, first and nowhere else, every token below 12"
    ):
        ngram.perplexity(train, [train, np.array([1, 2], np.uint16)], VOCABULARY)
    with pytest.raises(ValueError, match="train: token 7, vocabulary 4096, wanted a vocabulary of 2048 at most"):
        ngram.perplexity(train, [train], 4096)
