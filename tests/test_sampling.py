"""Sampling: the right distribution, from the right tokens, the same wherever a request is."""

import importlib

import pytest
import torch

import step_kernels as sk
from step_kernels.model import sampling
from step_kernels.model.sampling import Sampling, least_kept

noise_of = importlib.import_module("step_kernels.ops.choose")  # step_kernels.ops.choose itself is the op
CPU = torch.device("cpu")


def choose(logits, temperature, top_p, top_k, key, position, work):
    """As the decoder does, of rows that hold all requests in order."""
    least = least_kept(logits, temperature, top_p, top_k) if work == 2 else None
    rows = torch.arange(len(logits), device=logits.device)
    return sk.choose(logits, position, rows, *((temperature, key, least) if work else ()))


def draws(logits, temperature=1.0, top_p=1.0, top_k=0, seed=0, count=20000, work=None):
    """Tokens i64 [count] of logits [vocab] at positions 0 to count."""
    way = Sampling(temperature, top_p, top_k, seed)
    rows = torch.ones(count)
    return choose(
        logits.expand(count, -1), rows * temperature, rows * top_p, rows.long() * top_k, rows.long() * way.key(0),
        torch.arange(count), way.work if work is None else work,
    )  # fmt: skip


def random_logits(rows, vocab, seed=0):
    """With ties, as those of a bf16 head have."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).bfloat16().float()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    shares = draws(logits, temperature).bincount(minlength=5) / 20000
    assert (shares - (logits / temperature).softmax(-1)).abs().max() < 0.015  # four standard deviations are 0.014


@pytest.mark.parametrize("top_p, top_k", [(0.6, 0), (1.0, 3), (0.9, 4), (0.9, 1)])
def test_draws_follow_the_softmax_of_the_kept_tokens(top_p, top_k):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    order = logits.argsort(descending=True)
    probability = logits.softmax(-1)[order]
    kept = (probability.cumsum(0) - probability < top_p) & (torch.arange(5) < (top_k or 5))
    wanted = torch.zeros(5).index_put((order,), probability * kept / (probability * kept).sum())
    shares = draws(logits, top_p=top_p, top_k=top_k).bincount(minlength=5) / 20000
    assert (shares - wanted).abs().max() < 0.015
    assert ((shares > 0) == (wanted > 0)).all()


def test_a_flat_distribution_of_many_tokens_is_drawn_evenly():
    shares = (draws(torch.zeros(60000), count=300).float() + 0.5) / 60000
    assert shares.unique().numel() > 290
    assert (shares.sort().values - torch.linspace(0, 1, 300)).abs().max() < 0.11  # Kolmogorov: 1 in 1000


def test_noise_is_gumbels_and_rows_are_independent():
    keys = torch.tensor([Sampling(seed=s).key(r) for s in range(4) for r in range(4)])
    noise = noise_of.gumbel(keys, torch.arange(16) % 3, noise_of.vocabulary_noise(50000, CPU)).double()
    assert (noise.mean(-1) - 0.5772).abs().max() < 0.025 and (noise.var(-1) - 1.6449).abs().max() < 0.1
    assert (noise.corrcoef() - torch.eye(16)).abs().max() < 0.025  # five standard deviations are 0.022
    assert noise.isfinite().all()


def test_every_word_of_the_hash_gives_finite_noise(monkeypatch):
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 2, 2**32 - 1])
    monkeypatch.setattr(noise_of, "hash_", lambda x: words.expand(len(x), -1).clone() if x.dim() == 2 else x)
    noise = noise_of.gumbel(torch.tensor([0]), torch.tensor([0]), words)[0]
    assert noise.isfinite().all() and (noise.diff() <= 0).all() and noise[0] > 22


def test_hash_equals_that_of_32_bit_words():
    """lowbias32 in Python's integers."""

    def wanted(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    words = [0, 1, 77, 2**31, 2**32 - 1, *range(10**9, 4 * 10**9, 10**7)]
    assert noise_of.hash_(torch.tensor(words)).tolist() == [wanted(word) for word in words]


def test_greedy_rows_take_the_best_token_whatever_else_the_step_does():
    logits = random_logits(8, 3000)
    rows = torch.ones(8)
    for work in (0, 1, 2):
        got = choose(logits, rows * 0, rows * 0.5, rows.long(), rows.long(), rows.long(), work)
        assert got.tolist() == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_whatever_the_other_rows_want():
    logits = random_logits(3, 3000)
    temperature, top_p = torch.tensor([0.0, 1.0, 0.7]), torch.tensor([1.0, 1.0, 0.8])
    top_k, key, position = torch.tensor([0, 0, 40]), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    for _ in range(20):
        together = choose(logits, temperature, top_p, top_k, key, position, 2)
        for row, work in enumerate((0, 1, 2)):
            one = (t[row : row + 1] for t in (logits, temperature, top_p, top_k, key, position))
            assert choose(*one, work).tolist() == [together[row].item()]
        position = position + 1


def test_many_rows_draw_what_each_draws_alone(monkeypatch):
    logits = random_logits(1, 500)[0]
    wanted = draws(logits, 3.0, top_p=0.9, count=100)
    for module in (sampling, noise_of):
        monkeypatch.setattr(module, "AT_ONCE", 3600)  # seven rows at a time
    assert torch.equal(draws(logits, 3.0, top_p=0.9, count=100), wanted) and wanted.unique().numel() > 5


def test_top_p_and_top_k_keep_the_tokens_that_tie_with_the_last_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert draws(logits, top_k=2).unique().tolist() == [1, 2, 3, 4]
    assert draws(logits, top_p=0.6).unique().tolist() == [1, 2, 3, 4]  # 0.45 alone, 0.61 with one of the three
    assert draws(logits, top_p=0.4).unique().tolist() == [1]


def test_top_p_keeps_1024_tokens_of_a_flatter_distribution_and_all_of_them_at_1():
    logits = torch.arange(1500) * -1e-4
    assert draws(logits, top_p=0.99, count=8000).max() == 1023
    for work in (1, 2):
        assert draws(logits, top_p=1.0, count=8000, work=work).max() == 1499


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_the_lowest_temperatures_are_greedy(temperature):
    logits = random_logits(1, 3000)[0]
    assert draws(logits, temperature, count=50).unique().tolist() == [logits.argmax().item()]


def test_keys_differ_by_seed_and_request():
    keys = {Sampling(seed=seed).key(request) for seed in (0, 1, -1, 2**32, 2**40 + 1) for request in range(200)}
    assert len(keys) == 1000 and all(0 <= key < 2**32 for key in keys)


@pytest.mark.gpu
@pytest.mark.parametrize("work", [0, 1, 2])
def test_the_gpu_draws_what_the_cpu_draws(work):
    logits = random_logits(64, 128896)
    arguments = (
        logits, torch.rand(64) + 0.3, torch.rand(64) * 0.5 + 0.5, torch.arange(64) * 15,
        torch.tensor([Sampling(seed=3).key(r) for r in range(64)]), torch.arange(64, dtype=torch.int32) * 1000,
    )  # fmt: skip
    wanted = choose(*arguments, work)
    got = choose(*(t.cuda() for t in arguments), work).cpu()
    assert (got != wanted).sum() <= 1, (got, wanted)  # a logarithm's last bit may turn a tie
    hashes = [noise_of.vocabulary_noise(128896, torch.device(device)).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*hashes)
