"""A 5-gram model with interpolated modified Kneser-Ney smoothing, the baseline that a trained model has to beat.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), sections 3 and 4.1.6.
"""

from __future__ import annotations

import numpy as np

ORDER = 5
BITS = 11  # five tokens of 11 bits fit one u64: the newest in the highest bits, the oldest in the lowest
SCORED = 511  # tokens of a document after its first


def perplexity(train: np.ndarray, documents: list[np.ndarray], vocabulary: int = 1 << BITS) -> float:
    """exp of the mean negative log probability of the first 511 tokens after BOS of every document."""
    return float(np.exp(-np.log(probabilities(train, documents, vocabulary)).mean()))


def probabilities(train: np.ndarray, documents: list[np.ndarray], vocabulary: int = 1 << BITS) -> np.ndarray:
    """f64, p(token | up to four before it) of the first 511 tokens after BOS of every document, one after another.

    train: u16, documents that each start with BOS; its first token says which that is. A history ends at BOS, and
    BOS itself is never predicted.
    """
    if vocabulary > 1 << BITS or train.max() >= vocabulary:
        raise ValueError(
            f"train: token {train.max()}, vocabulary {vocabulary}, wanted a vocabulary of {1 << BITS} at most"
        )
    bos = int(train[0])
    for i, document in enumerate(documents):
        if np.flatnonzero(np.equal(document, bos)).tolist() != [0] or np.max(document) >= vocabulary:
            raise ValueError(
                f"documents[{i}]: wanted BOS, {bos}, first and nowhere else, every token below {vocabulary}"
            )
    documents = [np.asarray(document[: SCORED + 1], np.uint16) for document in documents]
    queries = _ngrams(np.concatenate(documents), bos)
    known = np.concatenate([np.minimum(np.arange(2, len(document) + 1), ORDER) for document in documents])

    keys, counts = _unique(_ngrams(train, bos))
    steps = []
    for order in range(ORDER, 0, -1):
        if order < ORDER:
            keys, counts = _shorter(keys, counts, bos)
        # Two of BOS stand only in the padding, which makes the shorter ones; the model itself never sees them.
        real = (_token(keys, 1) != bos) | (order == 1)
        steps.append(_interpolation(keys[real], counts[real], queries >> np.uint64(BITS * (ORDER - order)), order))
    found = np.full(len(queries), 1 / (vocabulary - 1))  # BOS never comes next
    for order, (share, rest) in zip(range(1, ORDER + 1), reversed(steps)):
        found = np.where(known >= order, share + rest * found, found)
    return found


def _ngrams(tokens: np.ndarray, bos: int) -> np.ndarray:
    """u64, the 5-gram that ends at each token other than BOS; BOS fills the places before a document."""
    padded = np.repeat(tokens, np.where(tokens == bos, ORDER - 1, 1))
    keys = np.zeros(len(padded) - ORDER + 1, np.uint64)
    for place in range(ORDER):
        keys |= padded[place : place + len(keys)].astype(np.uint64) << np.uint64(BITS * place)
    return keys[padded[ORDER - 1 :] != bos]


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys.sort()
    starts = _starts(keys)
    return keys[starts], np.diff(starts, append=len(keys))


def _starts(keys: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))


def _token(keys: np.ndarray, place: int) -> np.ndarray:
    return keys >> np.uint64(BITS * place) & np.uint64((1 << BITS) - 1)


def _shorter(keys: np.ndarray, counts: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams one shorter, still sorted, and how many tokens stand before each; after BOS, how often it stands."""
    keys = keys >> np.uint64(BITS)
    starts = _starts(keys)
    kinds, sums = np.diff(starts, append=len(keys)), np.add.reduceat(counts, starts)
    keys = keys[starts]
    return keys, np.where(_token(keys, 0) == bos, sums, kinds)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """f64 [4]: what counts of 0, 1, 2, and 3 or more lose; 0.5, 1, 1.5 where rare n-grams are too few to tell."""
    once, twice, thrice, four = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if min(once, twice, thrice) > 0:
        share = once / (once + 2 * twice)
        found = np.array(
            [0, 1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice]
        )
        if np.all(found[1:] > 0):
            return found
    return np.array([0, 0.5, 1, 1.5])


def _interpolation(
    keys: np.ndarray, counts: np.ndarray, queries: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """f64 each: the discounted share of every query after its history, and the weight of the shorter history."""
    if len(keys) == 0:
        return np.zeros(len(queries)), np.ones(len(queries))
    discounts = _discounts(counts)
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    own = np.where(keys[place] == queries, counts[place], 0)
    own = own - discounts[np.minimum(own, 3)]

    low = np.uint64((1 << BITS * (order - 1)) - 1)  # a history is all but the newest token
    histories, query = np.unique(queries & low, return_inverse=True)
    place = np.minimum(np.searchsorted(histories, keys & low), len(histories) - 1)
    wanted = histories[place] == keys & low
    place, counts = place[wanted], counts[wanted]
    total = np.bincount(place, counts, len(histories))
    taken = np.bincount(place, discounts[np.minimum(counts, 3)], len(histories))
    seen = total > 0
    total = np.where(seen, total, 1)
    return own / total[query], np.where(seen, taken / total, 1)[query]
