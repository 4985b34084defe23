"""sm90's paged_prefill kernel with all products in FP8 against the mode's reference, and needles among 128k keys."""

from __future__ import annotations

import pytest
import torch
from test_cuda_paged_attention import BF16, DEVICE, F8, exact, inputs
from test_cuda_paged_prefill import CHUNKS, MIXED

import step_kernels as sk
from step_kernels.cuda import paged_prefill
from step_kernels.cuda.paged_prefill import counter
from step_kernels.ops.paged_attention import fp8_reference
from step_kernels.testing import relative_error

# The matrix unit's short sums move a score by up to 1e-3, which moves some probabilities by a step of e4m3, 2^-4.
MOST_FROM_REFERENCE = 1e-2
MOST_ERROR = 5e-2  # against float64; 3.9e-2 is usual
WAYS = (128, "split")


def launch(a: dict, **how) -> torch.Tensor:
    return paged_prefill.launch(*a.values(), fp8=True, **how)


def check(a: dict, **how) -> torch.Tensor:
    """The kernel's output, near the mode's reference and not far from float64; its counter is zero again."""
    out, wanted = launch(a, **how), fp8_reference(*(a | {"q": a["q"].double()}).values())[0]
    from_reference, error = relative_error(out, wanted), relative_error(out, exact(a))
    assert from_reference <= MOST_FROM_REFERENCE and error <= MOST_ERROR, f"{from_reference:.1e} and {error:.1e}"
    assert not counter(out.device).any()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_chunks_are_near_the_reference(heads, window, page_size):
    check(inputs(CHUNKS, heads, page_size=page_size, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
@pytest.mark.parametrize("heads", [8, 12])
@pytest.mark.parametrize("window", [None, 1, 2, 37, 95, 96, 97, 128, 129, 512, 10**12])
def test_mixtures_in_every_variant(variant, heads, window):
    check(inputs(MIXED, heads, 1, 32, window), variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (10, 2), (16, 1), (52, 4), (7, 1), (40, 1)])
def test_groups_up_to_16_and_more(heads, kv_heads):
    check(inputs([(33, 300), (130, 200), (1, 1)], heads, kv_heads, 16, scalar=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("variant", WAYS)
def test_every_length_of_two_tiles(window, variant):
    for new in (1, 5, 1000):
        requests = [(min(new, length), length) for length in range(1, 2 * 128 + 3)]
        check(inputs(requests[:130], 2, 1, 16, window), variant=variant)
        check(inputs(requests[130:], 2, 1, 64, window), variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, 512)])
def test_one_chunk_of_a_long_request(heads, window):
    check(inputs([(24, 131072)], heads, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_a_needle_among_128k_keys_gives_its_value_back_at_any_position(variant):
    a = inputs([(16, 131072)], 16, 2, gate=False) | {"softmax_scale": 0.2}
    a["q"][:] = a["q"][0, 0]
    needle = a["q"][0, 0].to(F8).view(torch.uint8)  # of a score of 26; others' reach 10 of 2.3 each
    keys, wrong = a["k_cache"].view(torch.uint8), []
    ends = [
        131072 - 16 - i for i in (0, 1, 80, 81, 96, 112, 113, 175, 176)
    ]  # the newest that all see; tiles from the end
    for position in (0, 1, 15, 16, 63, 64, 95, 96, 127, 128, 8191, 65535, 65536, 65600, *ends):
        page, row = a["block_table"][0, position // 64].item(), position % 64
        kept = keys[page, :, row].clone()
        keys[page, :, row] = needle
        wanted = a["v_cache"][page, :, row].double() * a["v_scale"].double()[:, None]
        out = launch(a, variant=variant).double().view(16, 2, 8, 128)
        keys[page, :, row] = kept
        error = relative_error(out, wanted[None, :, None].expand_as(out))
        if not error <= 3e-3:
            wrong.append((position, error))
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_a_mean_of_128k_values_is_as_accurate_as_one_of_300(variant):
    for length in (300, 131072):
        a = inputs([(16, length)], 16, 2, gate=False) | {"softmax_scale": 1e-3}
        values = torch.randn(a["v_cache"].shape, device=DEVICE) * 0.3 + 1
        seen = ~a["v_cache"].float().isnan()
        a["v_cache"] = values.where(seen, torch.nan).to(F8)
        error = relative_error(launch(a, variant=variant), exact(a))
        assert error <= 4e-3, f"{length} keys: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_scores_spread_over_128k_keys_err_like_those_over_4k(variant):
    errors = [relative_error(check(a, variant=variant), exact(a)) for a in (
        inputs([(16, length)], 16, 2, gate=False) for length in (4096, 131072)
    )]  # fmt: skip
    assert errors[1] <= 1.25 * errors[0], errors


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("variant", WAYS)
def test_bits_repeat(window, variant):
    a = inputs([(900, 9000), (300, 300), (70, 20000)], 96, window=window)
    out = launch(a, variant=variant)
    assert all(torch.equal(launch(a, variant=variant), out) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_rows_without_keys_are_zero_and_requests_of_fewer_tokens_are_left_alone(variant):
    a = inputs([(2, 2), (3, 1), (2, 0)], 16, 2, gate=False)  # the second has two rows before its first token
    a["q"] = torch.cat((a["q"], torch.ones_like(a["q"][:3])))  # padding past query_start[-1]
    out = launch(a, variant=variant)
    assert out[[0, 1, 4]].any(-1).all() and not out[[2, 3, *range(5, 10)]].any()
    kept, lse = torch.full_like(a["q"], 7), torch.full((10, 16), 7.0, device=DEVICE)
    launch(a, variant=variant, fewest=3, out=kept, lse=lse)
    assert (kept[[0, 1, 5, 6]] == 7).all() and (lse[[0, 1, 5, 6]] == 7).all()
    assert torch.equal(kept[[2, 3, 4, 7, 8, 9]], out[[2, 3, 4, 7, 8, 9]]) and (lse[[2, 3, 7]] == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_log_sum_exp_is_that_of_the_reference(variant):
    a = inputs([(30, 700), (3, 65)], 24, 2, 32, 150) | {"softmax_scale": 0.2}
    lse = torch.full((33, 24), torch.nan, device=DEVICE)
    check(a, lse=lse, variant=variant)
    wanted = fp8_reference(*(a | {"q": a["q"].double()}).values())[1]
    torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=0.12)  # e4m3 steps by 1/8 at most
    assert (lse - wanted).abs().mean() <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_a_nan_request_spoils_no_other(variant):
    a = inputs([(30, 100), (20, 300), (10, 700)], 64)
    clean = launch(a, variant=variant)
    a["q"][0, 3, 5] = torch.inf
    a["k_cache"].view(torch.uint8)[a["block_table"][0, 1].item(), 5, 7, 9] = 0xFF  # position 71, head 5
    a["v_cache"].view(torch.uint8)[a["block_table"][1, 1].item(), 2, 7, 9] = 0x7F
    out = launch(a, variant=variant)
    assert out[0, 3].isnan().all() and out[30:50, 16:24, 9].isnan().all() and out[1:30, 40:48].isnan().all()
    assert torch.equal(out[50:], clean[50:]) and torch.equal(out[30:50, :16], clean[30:50, :16])
    assert torch.equal(out[30:50, 16:24, 10:], clean[30:50, 16:24, 10:])
    assert torch.equal(out[1:30, 8:40], clean[1:30, 8:40]) and torch.equal(out[0, :3], clean[0, :3])


@pytest.mark.gpu
def test_views_give_the_bits_of_their_copies():
    a = inputs([(30, 300), (20, 129)], 64, page_size=32)
    both = torch.stack([a[name].view(torch.uint8) for name in ("k_cache", "v_cache")], 2).view(F8)
    views = {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}
    assert torch.equal(launch(a | views), launch(a))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e20])
@pytest.mark.parametrize("sign", [-1, 1])
def test_queries_of_any_size(size, sign):
    a = inputs([(40, 400), (30, 200)], 64, gate=False)
    a |= {"q": (a["q"].float() * size).to(BF16), "softmax_scale": sign * 0.09 / size}
    for variant in WAYS:
        check(a, variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_scores_that_rise_and_fall_along_the_keys(variant):
    a = inputs([(50, 3000)], 16, 2, 16, gate=False)
    pages = a["block_table"][0].clamp(min=0).long()
    ramp = torch.cat((torch.linspace(0.1, 4, 94), torch.linspace(4, 0.1, 94)))[: len(pages)].to(DEVICE)
    k = a["k_cache"].float()
    k[pages[:188]] *= ramp[:188, None, None, None]
    a |= {"k_cache": k.to(F8)}
    wanted = fp8_reference(*(a | {"q": a["q"].double()}).values())[0]
    assert relative_error(launch(a, variant=variant), wanted) <= MOST_FROM_REFERENCE


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("variant", WAYS)
def test_a_cuda_graph_replays_on_other_lengths(window, variant):
    a = inputs([(100, 4000)] * 4, 96) | {"window": window}
    launch(a, variant=variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(a, variant=variant)
    for lengths, start in (([1, 130, 3999, 64], [0, 1, 100, 390, 400]), ([700, 5, 2000, 0], [0, 3, 3, 400, 400])):
        a["seq_lens"].copy_(torch.tensor(lengths))
        a["query_start"].copy_(torch.tensor(start))
        for _ in range(3):
            graph.replay()
        assert torch.equal(out, launch(a, variant=variant))
        assert relative_error(out, exact(a)) <= MOST_ERROR


@pytest.mark.gpu
def test_the_op_rounds_only_where_that_was_allowed_and_tokens_are_many(monkeypatch):
    many, few = inputs([(200, 300)], 64), inputs([(1, 300)], 64)
    monkeypatch.delenv("STEP_KERNELS_FP8_ATTENTION", raising=False)
    kept = [sk.paged_attention(*a.values()) for a in (many, few)]
    monkeypatch.setenv("STEP_KERNELS_FP8_ATTENTION", "1")
    assert torch.equal(sk.paged_attention(*many.values()), launch(many)) and not torch.equal(launch(many), kept[0])
    assert torch.equal(sk.paged_attention_lse(*many.values())[0], launch(many))
    assert torch.equal(sk.paged_attention(*few.values()), kept[1])
