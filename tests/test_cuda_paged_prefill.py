"""sm90's paged_prefill kernel against the reference in float64: chunks, pages, windows, groups, leaks, graphs."""

from __future__ import annotations

import pytest
import torch
from test_cuda_paged_attention import BF16, DEVICE, F8, MOST_ERROR, exact, inputs

from step_kernels.cuda.paged_prefill import TILES, counter, launch, refuse, shares_items, tile_keys
from step_kernels.testing import relative_error

# (new tokens, tokens with those)
CHUNKS = [(200, 200), (70, 1000), (129, 129), (1, 65), (16, 4000)]
WAYS = (*TILES, "split")
MIXED = [(1, 67), (5, 5), (0, 6), (19, 50), (0, 0), (1, 1), (3, 1), (2, 0), (170, 300), (8, 129)]


def check(a: dict, **how) -> torch.Tensor:
    """The kernel's output, its error against float64 at most MOST_ERROR, and 2^-8 a request; its counter is zero again.

    Probabilities of a bf16 cache and outputs are rounded to bf16, each by up to 2^-9: a few values can err by both.
    """
    out, wanted = launch(*a.values(), **how), exact(a)
    bounds = a["query_start"].tolist()
    errors = [relative_error(out[b:e], wanted[b:e]) for b, e in zip(bounds, bounds[1:]) if e > b]
    assert max(errors) <= 2**-8, f"errors by request {[f'{e:.1e}' for e in errors]}"
    assert relative_error(out, wanted) <= MOST_ERROR
    assert not counter(out.device).any()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("cache", [F8, BF16])
def test_chunks_err_less_than_the_goal(heads, window, page_size, cache):
    check(inputs(CHUNKS, heads, page_size=page_size, window=window, cache=cache))


@pytest.mark.gpu
def test_e4m3_caches_cost_no_accuracy():
    a = inputs([(300, 1500)], 64, gate=False)
    wanted = exact(a)
    assert relative_error(launch(*a.values()), wanted) <= 1.05 * relative_error(wanted.to(BF16), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
@pytest.mark.parametrize("heads", [8, 12])
@pytest.mark.parametrize("window", [None, 1, 2, 37, 111, 112, 113, 128, 129, 512, 10**12])
@pytest.mark.parametrize("cache", [F8, BF16])
def test_mixtures_in_every_variant(variant, heads, window, cache):
    check(inputs(MIXED, heads, 1, 32, window, cache=cache), variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (10, 2), (16, 1), (32, 2), (52, 4), (7, 1), (22, 2)])
def test_groups_up_to_16_and_more(heads, kv_heads):
    check(inputs([(33, 300), (130, 200), (1, 1)], heads, kv_heads, 16, scalar=True))
    check(inputs([(9, 100)], 40, 1, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
def test_every_length_of_two_tiles(window):
    lengths = range(1, 2 * max(TILES) + 3)
    for cache in (F8, BF16):
        for new in (1, 5, 1000):
            for variant in WAYS:
                requests = [(min(new, length), length) for length in lengths]
                check(inputs(requests[:130], 2, 1, 16, window, cache=cache), variant=variant)
                check(inputs(requests[130:], 2, 1, 64, window, cache=cache), variant=variant)


@pytest.mark.gpu
def test_every_length_of_two_pages_past_the_window():
    for cache in (F8, BF16):
        for part in range(512, 512 + 2 * 64 + 1, 43):
            check(inputs([(20, part + i) for i in range(43)], 24, 2, 64, 512, cache=cache))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
def test_one_chunk_of_a_long_request(heads, window):
    check(inputs([(40, 131072)], heads, window=window))


@pytest.mark.gpu
def test_more_requests_than_a_launch_takes():
    check(inputs([(1 + (i == 300) * 40, 43 + i % 90) for i in range(600)], 8, 1, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("variant", WAYS)
def test_bits_repeat(cache, window, variant):
    a = inputs([(900, 9000), (300, 300), (70, 20000)], 96, window=window, cache=cache)
    out = launch(*a.values(), variant=variant)
    assert all(torch.equal(launch(*a.values(), variant=variant), out) for _ in range(30))


@pytest.mark.gpu
def test_rows_without_keys_or_without_a_request_are_zero():
    a = inputs([(2, 2), (3, 1), (2, 0)], 16, 2, gate=False)  # the second has two rows before its first token
    a["q"] = torch.cat((a["q"], torch.ones_like(a["q"][:3])))  # padding past query_start[-1]
    for window in (None, 2):
        out = launch(*(a | {"window": window}).values())
        assert out[[0, 1, 4]].any(-1).all() and not out[[2, 3, *range(5, 10)]].any()
    none = a | {"block_table": a["block_table"][:0], "seq_lens": a["seq_lens"][:0], "query_start": a["query_start"][:1]}
    assert not launch(*none.values()).any()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("variant", WAYS)
def test_requests_of_fewer_tokens_are_left_alone(cache, variant):
    a = inputs([(1, 70), (5, 300), (4, 4), (0, 9), (30, 100)], 16, 2, gate=False, cache=cache)
    a["q"] = torch.cat((a["q"], torch.ones_like(a["q"][:3])))  # padding past query_start[-1]
    whole, out = launch(*a.values(), variant=variant), torch.full_like(a["q"], 7)
    lse = torch.full((43, 16), 7.0, device=DEVICE)
    assert launch(*a.values(), lse=lse, fewest=5, out=out, variant=variant) is out
    kept = torch.tensor([0, *range(6, 10)])
    assert (out[kept] == 7).all() and (lse[kept] == 7).all() and (lse[1:6] != 7).all() and (lse[10:] != 7).all()
    assert relative_error(out[1:6], whole[1:6]) <= MOST_ERROR  # shares end elsewhere
    assert relative_error(out[10:40], whole[10:40]) <= MOST_ERROR and not out[40:].any()


# As the scores err, which for e4m3 keys are the matrix unit's short sums: see the same test of paged_attention.
@pytest.mark.gpu
@pytest.mark.parametrize("cache, limit", [(F8, 1e-2), (BF16, 1e-3)])
@pytest.mark.parametrize("variant", WAYS)
def test_log_sum_exp_is_that_of_the_scaled_scores(cache, limit, variant):
    a = inputs([(30, 700), (3, 65)], 24, 2, 32, 150, cache=cache) | {"softmax_scale": 0.2}
    lse = torch.full((33, 24), torch.nan, device=DEVICE)
    check(a, lse=lse, variant=variant)
    k_scale = a["k_scale"].double() if cache == F8 else torch.ones(2, device=DEVICE, dtype=torch.float64)
    wanted = []
    starts, lengths = a["query_start"].tolist(), a["seq_lens"].tolist()
    for request, (begin, end) in enumerate(zip(starts, starts[1:])):
        for token in range(begin, end):
            position = lengths[request] - end + token
            key = torch.arange(max(0, position - 149), position + 1, device=DEVICE)
            page = a["block_table"][request, key // 32].long()
            keys = a["k_cache"][page, :, key % 32].double() * k_scale[:, None]
            scores = torch.einsum("ngd,knd->ngk", a["q"][token].double().view(2, 12, 128), keys) * 0.2
            wanted.append(scores.logsumexp(-1).flatten())
    torch.testing.assert_close(lse.double(), torch.stack(wanted), rtol=0, atol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", WAYS)
def test_a_nan_request_spoils_no_other(variant):
    a = inputs([(30, 100), (20, 300), (10, 700)], 64)
    clean = launch(*a.values(), variant=variant)
    a["q"][0, 3, 5] = torch.inf
    a["k_cache"].view(torch.uint8)[a["block_table"][0, 1].item(), 5, 7, 9] = 0xFF  # position 71, head 5
    a["v_cache"].view(torch.uint8)[a["block_table"][1, 1].item(), 2, 7, 9] = 0x7F
    out = launch(*a.values(), variant=variant)
    assert out[0, 3].isnan().all() and out[30:50, 16:24, 9].isnan().all() and out[1:30, 40:48].isnan().all()
    assert torch.equal(out[50:], clean[50:]) and torch.equal(out[30:50, :16], clean[30:50, :16])
    assert torch.equal(out[1:30, 8:40], clean[1:30, 8:40]) and torch.equal(out[0, :3], clean[0, :3])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
def test_views_give_the_bits_of_their_copies(cache):
    a = inputs([(30, 300), (20, 129)], 64, page_size=32, cache=cache)
    out = launch(*a.values())
    k, v = (a[name].view(torch.uint8) for name in ("k_cache", "v_cache"))
    both = torch.stack((k, v), 2).view(cache)
    for views in (
        {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]},
        {
            name: x.transpose(1, 2).contiguous().transpose(1, 2).view(cache)
            for name, x in (("k_cache", k), ("v_cache", v))
        },
        {name: a[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "block_table", "gate")},
        {name: torch.stack((a[name], a[name]), -1)[..., 0] for name in ("q", "block_table", "k_scale", "gate")},
    ):
        assert torch.equal(launch(*(a | views).values()), out), list(views)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e20])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("variant", WAYS)
def test_queries_of_any_size(size, sign, cache, variant):
    a = inputs([(40, 400), (30, 200)], 64, gate=False, cache=cache)
    check(a | {"q": (a["q"].float() * size).to(BF16), "softmax_scale": sign * 0.2 / size}, variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("variant", WAYS)
def test_one_key_far_above_all_others_is_found(cache, variant):
    a = inputs([(16, 131072)], 64, gate=False, cache=cache)
    page = a["block_table"][0, 1500].item()
    key = (a["q"][7].view(8, 8, 128).float().mean(1) * 8).to(cache)
    a["k_cache"].view(torch.uint8)[page, :, 11] = key.view(torch.uint8)  # float8 has no indexed assignment
    check(a, variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("variant", WAYS)
def test_scores_that_rise_and_fall_along_the_keys(cache, variant):
    a = inputs([(50, 3000)], 16, 2, 16, gate=False, cache=cache)
    pages = a["block_table"][0].clamp(min=0).long()
    ramp = torch.cat((torch.linspace(0.1, 4, 94), torch.linspace(4, 0.1, 94)))[: len(pages)].to(DEVICE)
    k = a["k_cache"].float()
    k[pages[:188]] *= ramp[:188, None, None, None]
    check(a | {"k_cache": k.to(cache), "softmax_scale": 1.0}, variant=variant)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("variant", WAYS)
def test_a_cuda_graph_replays_on_other_lengths(window, cache, variant):
    a = inputs([(100, 4000)] * 4, 96, cache=cache) | {"window": window}
    launch(*a.values(), variant=variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(*a.values(), variant=variant)
    for lengths, start in (([1, 130, 3999, 64], [0, 1, 100, 390, 400]), ([700, 5, 2000, 0], [0, 3, 3, 400, 400])):
        a["seq_lens"].copy_(torch.tensor(lengths))
        a["query_start"].copy_(torch.tensor(start))
        for _ in range(3):
            graph.replay()
        assert torch.equal(out, launch(*a.values(), variant=variant))
        assert relative_error(out, exact(a)) <= MOST_ERROR


def test_kernel_refuses_what_it_cannot_read():
    a = inputs([(9, 9)], 8, 1, 16)
    assert refuse(*a.values()) is None
    assert "takes q in bfloat16, got float32" in refuse(*(a | {"q": a["q"].float()}).values())
    f16 = {name: a[name].to(torch.float16) for name in ("k_cache", "v_cache")}
    assert "takes float8_e4m3fn and bfloat16 caches, got float16" in refuse(*(a | f16).values())
    assert "pages of a power of two from 16 on, got 8" in refuse(*inputs([(1, 9)], 8, 1, 8).values())
    narrow = {name: a[name][..., :64] for name in ("q", "k_cache", "v_cache")}
    assert "takes 128 values a head, got 64" in refuse(*(a | narrow).values())
    turned = a["v_cache"].view(torch.uint8).mT.contiguous().mT.view(F8)
    assert "multiples of 16 bytes" in refuse(*(a | {"v_cache": turned}).values())


def test_tiles_fit_the_window():
    # 512 and 16 tokens, begun at any of 16 positions, reach over 543 keys: 5 tiles of 112, or of 128
    assert [tile_keys(8, window) for window in (None, 512, 97, 98, 4096)] == [128, 112, 128, 112, 112]


def test_blocks_share_items_that_are_few_or_of_few_tokens():
    def shared(*shape, window=None):
        return shares_items(*shape, 8, window, 132)

    assert shared(8, 1, 8) and shared(10 * 64, 64, 12) and shared(512, 1, 8)  # drafts; 32 row tiles of 8 heads
    assert not shared(528, 1, 8) and not shared(8192, 1, 8) and not shared(257, 257, 8)
    assert not shared(8, 1, 12, window=512) and shared(8, 1, 12, window=10**6)
