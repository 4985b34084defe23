"""FP8 attention: its reference, what it costs in accuracy, and who may use it."""

from __future__ import annotations

import pytest
import torch

from step_kernels import fp8_attention, registry
from step_kernels.cuda import paged_prefill_fp8
from step_kernels.testing import relative_error

F8 = torch.float8_e4m3fn


@pytest.mark.parametrize("size, both, queries, probabilities", [(1, 0.0387, 0.028, 0.026), (2, 0.050, 0.045, 0.022)])
def test_rounding_moves_gaussian_outputs_by_four_percent(size, both, queries, probabilities):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(64, 128, generator=generator).double() * size
    k, v = (torch.randn(2000, 128, generator=generator).to(F8).double() for _ in range(2))
    scores, rounded = (x @ k.mT / 128**0.5 for x in (q, fp8_attention.round_queries(q)))
    wanted = scores.softmax(-1) @ v
    assert relative_error(fp8_attention.weigh(rounded)[0] @ v, wanted) == pytest.approx(both, rel=0.15)
    assert relative_error(rounded.softmax(-1) @ v, wanted) == pytest.approx(queries, rel=0.15)
    assert relative_error(fp8_attention.weigh(scores)[0] @ v, wanted) == pytest.approx(probabilities, rel=0.15)


def test_queries_are_rounded_by_the_power_of_two_that_brings_a_row_to_128_and_more():
    largest = torch.tensor([128.0, 255.0, 1.0, 1.999, 2.0**100, 2.0**-110], dtype=torch.float64)
    q = torch.stack((largest, largest * 0.55, largest * 2.0**-17), 1)
    out = fp8_attention.round_queries(q)
    # e4m3 steps by 8 from 64 and by 16 from 128 on, and below 2^-6 by 2^-9: 2^-10 is a tie that goes to zero
    assert (out[:, 0] / largest).tolist() == [1, 256 / 255, 1, 2 / 1.999, 1, 1]
    assert out[0].tolist() == [128, 72, 0] and out[2, 1] == 0.5625
    q[0, 1], q[1, 1] = torch.inf, torch.nan
    assert fp8_attention.round_queries(q).isnan().all(-1).tolist() == [True, True, False, False, False, False]


def test_one_key_far_above_all_others_has_all_the_weight_and_those_2_to_the_18_below_have_none():
    scores = torch.zeros(3, 5, dtype=torch.float64)
    scores[0, 3] = 40.3
    scores[1] = -torch.inf
    scores[2] = torch.tensor([0.0, -16.0, -17.0, -18.0, -1.0]) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    weights, sums = fp8_attention.weigh(scores)
    assert weights[0].tolist() == [0, 0, 0, 1, 0] and not weights[1].any() and sums[1] == -torch.inf
    assert sums[0] == pytest.approx(40.3, abs=0.07)  # half of e4m3's widest step
    assert (weights[2] / weights[2, 0]).tolist() == [1, 2.0**-16, 0, 0, 0.5]  # 2^-10 is a tie that goes to zero
    assert fp8_attention.weigh(scores[:, :0])[1].tolist() == 3 * [-torch.inf]


def test_nobody_rounds_who_was_not_asked_to(monkeypatch):
    q, few = torch.zeros(40, 16, 128, dtype=torch.bfloat16), torch.zeros(2, 16, 128, dtype=torch.bfloat16)
    cache, one = torch.zeros(3, 2, 16, 128).to(F8), torch.ones(())
    rest = (one, one, torch.zeros(1, 3, dtype=torch.int32), torch.tensor([40]), torch.tensor([0, 40]))
    refuse = paged_prefill_fp8.refuse
    monkeypatch.delenv("STEP_KERNELS_FP8_ATTENTION", raising=False)
    assert "STEP_KERNELS_FP8_ATTENTION=1 allows that" in refuse(q, cache, cache, *rest)
    monkeypatch.setenv("STEP_KERNELS_FP8_ATTENTION", "1")
    assert refuse(q, cache, cache, *rest) is None and refuse(q, cache, cache, *rest, None, None, 0.1) is None
    assert "is no faster in a window, got 512" in refuse(q, cache, cache, *rest, 512)
    assert "takes float8_e4m3fn caches, got bfloat16" in refuse(q, *2 * (cache.bfloat16(),), *rest)
    assert "takes many tokens a request, got 2 for 1" in refuse(few, cache, cache, *rest)
    assert "takes q in bfloat16" in refuse(q.float(), cache, cache, *rest)


def test_the_mode_stands_before_the_exact_kernel_in_both_tables():
    for op in ("paged_attention", "paged_attention_lse"):
        assert [kernel.name for kernel in registry._ops[op].kernels[:2]] == ["cuda-fp8", "cuda"]
