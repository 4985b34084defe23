"""sm90's paged_attention kernel against the reference in float64: lengths, pages, windows, groups, leaks, graphs."""

from __future__ import annotations

import pytest
import torch

import step_kernels as sk
from step_kernels.cuda import paged_attention
from step_kernels.cuda.paged_attention import (
    CLUSTERS,
    MOST_REQUESTS,
    THREADS,
    WARPGROUPS,
    cluster_size,
    has_many,
    launch,
    most_tiles,
    refuse,
    variant,
    warpgroups_for,
)
from step_kernels.testing import relative_error

F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ERROR = 3e-3  # of which bf16 outputs have 1.7e-3
# (new tokens, tokens with those)
DECODE = [(1, 70), (1, 1), (1, 64), (1, 65), (1, 2000), (1, 9000), (1, 513)]
DRAFTS = [(4, 70), (1, 1), (3, 3), (8, 4097), (2, 130), (7, 64), (5, 1000)]
MIXED = [(1, 67), (5, 5), (0, 6), (19, 50), (0, 0), (1, 1), (3, 1), (2, 0), (70, 300)]


def inputs(requests, heads, kv_heads=8, page_size=64, window=None, gate=True, scalar=False, cache=F8) -> dict:
    """Random arguments. Table entries of pages that no query sees are -1, and keys and values that none sees NaN."""
    g = torch.Generator(DEVICE).manual_seed(3)
    counts = [-(-length // page_size) for _, length in requests]
    width, pages = max(counts) + 1, sum(counts) + 1
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(3)).split(counts)
    table = torch.full((len(requests), width), -1, dtype=torch.int32)
    unseen = torch.ones(pages, page_size, dtype=torch.bool)
    for row, mine, (new, length) in zip(table, order, requests):
        first = 0 if window is None else max(0, length - new - window + 1)
        seen = torch.arange(first, length)
        row[first // page_size : len(mine)] = mine[first // page_size :]
        unseen[row[seen // page_size].long(), seen % page_size] = False
    new = torch.tensor([n for n, _ in requests])
    shape, blank = (pages, kv_heads, page_size, 128), unseen.to(DEVICE)[:, None, :, None]
    k, v = (torch.randn(shape, generator=g, device=DEVICE).masked_fill(blank, torch.nan).to(cache) for _ in range(2))
    scales = (torch.rand(() if scalar else kv_heads, generator=g, device=DEVICE) + 0.5 for _ in range(2))
    tokens = int(new.sum())
    return {
        "q": torch.randn(tokens, heads, 128, generator=g, device=DEVICE).to(BF16),
        "k_cache": k,
        "v_cache": v,
        **dict(zip(("k_scale", "v_scale"), scales)),
        "block_table": table.to(DEVICE),
        "seq_lens": torch.tensor([n for _, n in requests], dtype=torch.int32, device=DEVICE),
        "query_start": torch.tensor([0, *new.cumsum(0)], dtype=torch.int32, device=DEVICE),
        "window": window,
        "gate": torch.randn(tokens, heads, generator=g, device=DEVICE).to(BF16) if gate else None,
        "softmax_scale": None,
    }


def exact(a: dict) -> torch.Tensor:
    return sk.paged_attention.reference(*(a | {"q": a["q"].double()}).values())


def clusters(a: dict, columns: int | None = None) -> list[int]:
    """Cluster sizes that can serve the arguments, and 0, the kernel for any number of keys, which always can."""
    page_size, requests = a["k_cache"].shape[2], len(a["seq_lens"])
    group = a["q"].shape[1] // a["k_cache"].shape[1]
    columns = columns or variant(group, -(-len(a["q"]) // requests))
    tiles = most_tiles(a["window"], columns // group, a["block_table"].shape[1] * page_size)
    few = a["k_cache"].dtype == F8
    return [0, *(size for size, most in CLUSTERS.items() if few and tiles <= size * most)]


def check(a: dict, **how) -> None:
    """Each request's error against float64 is at most MOST_ERROR, in every kernel that can serve it."""
    wanted, bounds = exact(a), a["query_start"].tolist()
    for cluster in [how.pop("cluster")] if "cluster" in how else clusters(a, how.get("columns")):
        for warpgroups in WARPGROUPS if cluster == 1 else (None,):
            out = launch(*a.values(), cluster=cluster, warpgroups=warpgroups, **how)
            errors = [relative_error(out[b:e], wanted[b:e]) for b, e in zip(bounds, bounds[1:])]
            name = f"cluster {cluster}, warpgroups {warpgroups}"
            assert max(errors) <= MOST_ERROR, f"{name}, errors by request {[f'{e:.1e}' for e in errors]}"


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("cache", [F8, BF16])
def test_one_token_a_request_errs_less_than_the_goal(heads, window, page_size, cache):
    check(inputs(DECODE, heads, page_size=page_size, window=window, cache=cache))


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [DRAFTS, MIXED], ids=["drafts", "mixed"])
@pytest.mark.parametrize("heads", [64, 96])
@pytest.mark.parametrize("columns", THREADS)
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("cache", [F8, BF16])
def test_several_tokens_a_request_in_every_variant(requests, heads, columns, window, cache):
    if columns >= heads // 8:
        check(inputs(requests, heads, page_size=32, window=window, cache=cache), columns=columns)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (10, 2), (16, 1), (32, 2), (52, 4)])
def test_groups_up_to_16(heads, kv_heads):
    check(inputs([(1, 300), (2, 77), (1, 1)], heads, kv_heads, 16, scalar=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 10**12])
def test_windows_of_less_and_more_than_a_tile(window):
    check(inputs([(1, 200), (3, 140), (1, 64), (2, 65), (1, 129)], 96, window=window, gate=False))


@pytest.mark.gpu
def test_every_length_of_two_pages_past_the_window():
    lengths = range(1, 512 + 2 * 64 + 1)
    for cache in (F8, BF16):
        for part in range(0, len(lengths), 160):
            check(inputs([(1, length) for length in lengths[part : part + 160]], 24, 2, 64, 512, cache=cache))


@pytest.mark.gpu
@pytest.mark.parametrize("least_tiles", [1, 2, 3, 5, 8, 1000])
def test_shares_of_any_size_give_the_same_result(least_tiles):
    for window in (None, 512):
        check(inputs([(1, 700), (1, 5000), (1, 64)], 64, window=window), least_tiles=least_tiles, cluster=0)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 96])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_drafts_in_a_window_in_clusters_of_every_size(heads, tokens):
    a = inputs([(tokens, length) for length in (511, 512, 513, 575, 576, 577, 640, 4000)], heads, window=512)
    assert clusters(a) == [0, 1, 2, 4, 8]
    check(a)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_reading_ahead_into_l2_changes_no_bit(ahead):
    a = inputs([(1, 90 * n) for n in range(12)], 96, page_size=16, window=512)
    for cluster in clusters(a)[1:]:
        assert torch.equal(launch(*a.values(), cluster=cluster, ahead=ahead), launch(*a.values(), cluster=cluster))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
def test_one_long_request(heads, window):
    check(inputs([(1, 131072)], heads, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, tokens", [(64, 3), (64, 4), (64, 8), (96, 2), (96, 3), (96, 5)])
def test_drafts_of_one_long_request(heads, tokens):
    check(inputs([(tokens, 40000)], heads))


@pytest.mark.gpu
@pytest.mark.parametrize("sign", [1, -1])
def test_drafts_whose_scores_rise_or_fall_with_the_position(sign):
    a = inputs([(4, 3003), (4, 700)], 64, gate=False)
    q = a["q"].view(2, 4, 8, 8, 128).float().mean((1, 3)) * sign
    k, table = a["k_cache"].float(), a["block_table"].long()
    for request, pages in ((0, 47), (1, 11)):
        rise = torch.linspace(0, 40, pages, device=DEVICE)[:, None, None, None]
        k[table[request, :pages]] += rise * q[request][:, None]
    for window in (None, 70):  # by 20 (log2) in all; what none sees stays NaN
        check(a | {"k_cache": k.to(F8), "window": window}, columns=32, cluster=0)


@pytest.mark.gpu
def test_a_nan_query_or_value_spoils_no_other_draft():
    a = inputs([(4, 100), (3, 3000)], 64)
    clean = launch(*a.values(), columns=32, cluster=0)
    a["q"][1, 3, 5] = torch.inf
    a["v_cache"].view(torch.uint8)[a["block_table"][1, 1].item(), 2, 7, 9] = 0x7F
    out = launch(*a.values(), columns=32, cluster=0)
    spoiled = torch.zeros_like(out, dtype=torch.bool)
    spoiled[1, 3] = spoiled[4:, 16:24, 9] = True
    assert torch.equal(out.isnan(), spoiled) and torch.equal(out[~spoiled], clean[~spoiled])


@pytest.mark.gpu
def test_bits_of_drafts_repeat():
    a = inputs([(4, 9000), (4, 300), (4, 20000)], 64)
    out = launch(*a.values(), columns=32, cluster=0)
    assert all(torch.equal(launch(*a.values(), columns=32, cluster=0), out) for _ in range(50))


@pytest.mark.gpu
def test_one_long_request_among_many_short_ones():
    check(inputs([(1, 2000 + i) for i in range(31)] + [(1, 100000)] + [(1, 100 + i) for i in range(31)], 64))


@pytest.mark.gpu
def test_more_requests_than_a_launch_takes():
    assert MOST_REQUESTS < 600
    check(inputs([(1 + (i == 300), 3 + i % 90) for i in range(600)], 8, 1, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("window", [None, 512])
def test_bits_repeat(cache, window):
    a = inputs([(1, 9000), (1, 300), (2, 20000)], 96, window=window, cache=cache)
    for cluster in clusters(a):
        out = launch(*a.values(), cluster=cluster)
        assert all(torch.equal(launch(*a.values(), cluster=cluster), out) for _ in range(100)), f"cluster {cluster}"


@pytest.mark.gpu
def test_rows_without_keys_or_without_a_request_are_zero():
    a = inputs([(2, 2), (3, 1), (2, 0)], 16, 2, gate=False)  # the second has two rows before its first token
    a["q"] = torch.cat((a["q"], torch.ones_like(a["q"][:3])))  # padding past query_start[-1]
    for window in (None, 2):
        for cluster in clusters(a):
            lse = torch.full((10, 16), torch.nan, device=DEVICE)
            out = launch(*(a | {"window": window}).values(), cluster=cluster, lse=lse)
            assert out[[0, 1, 4]].any(-1).all() and not out[[2, 3, *range(5, 10)]].any(), f"cluster {cluster}"
            assert lse[[0, 1, 4]].isfinite().all() and lse[[2, 3, *range(5, 10)]].isneginf().all()
    none = a | {"block_table": a["block_table"][:0], "seq_lens": a["seq_lens"][:0], "query_start": a["query_start"][:1]}
    assert not launch(*none.values()).any()


# The log errs by no more than the scores. bf16 keys' are f32 sums. FP8 sums cut addends 13 bits below the greatest: for
# scores of 8 to 16 each of 33 errs by up to 2^-10, signs at random: 2^-10 sqrt(33 / 3) = 3.2e-3 a product of 32, 1.4 of
# that with the three before. A model of this sum gives at most 4.1e-3 in 8 x 84 rows of such data.
@pytest.mark.gpu
@pytest.mark.parametrize("cache, limit", [(F8, 1e-2), (BF16, 1e-4)])
def test_log_sum_exp_is_that_of_the_scaled_scores(cache, limit):
    a = inputs([(1, 700), (3, 65)], 24, 2, 32, 150, cache=cache) | {"softmax_scale": 0.2}
    wanted = []
    starts, lengths = a["query_start"].tolist(), a["seq_lens"].tolist()
    for request, (begin, end) in enumerate(zip(starts, starts[1:])):
        for token in range(begin, end):
            position = lengths[request] - end + token
            key = torch.arange(max(0, position - 149), position + 1, device=DEVICE)
            page = a["block_table"][request, key // 32].long()
            keys = a["k_cache"][page, :, key % 32].double() * (a["k_scale"].double()[:, None] if cache == F8 else 1)
            scores = torch.einsum("ngd,knd->ngk", a["q"][token].double().view(2, 12, 128), keys) * 0.2
            wanted.append(scores.logsumexp(-1).flatten())
    for cluster in clusters(a):
        lse = torch.full((4, 24), torch.nan, device=DEVICE)
        launch(*a.values(), lse=lse, cluster=cluster)
        torch.testing.assert_close(lse.double(), torch.stack(wanted), rtol=0, atol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [0, 1, 4, 8])
def test_a_nan_request_spoils_no_other(cluster):
    a = inputs([(1, 100), (2, 300), (1, 700)], 64)
    clean = launch(*a.values(), cluster=cluster)
    a["q"][0, 3, 5] = torch.inf
    a["v_cache"].view(torch.uint8)[a["block_table"][1, 1].item(), 2, 7, 9] = 0x7F
    out = launch(*a.values(), cluster=cluster)
    assert out[0, 3].isnan().all() and out[1:3, 16:24, 9].isnan().all()
    assert torch.equal(out[3], clean[3]) and torch.equal(out[1:3, :16], clean[1:3, :16])


@pytest.mark.gpu
@pytest.mark.parametrize("cache, cluster", [(F8, 0), (F8, 1), (F8, 8), (BF16, 0)])
def test_views_give_the_bits_of_their_copies(cache, cluster):
    a = inputs([(1, 300), (2, 129)], 64, page_size=32, cache=cache)
    out = launch(*a.values(), cluster=cluster)
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
        assert torch.equal(launch(*(a | views).values(), cluster=cluster), out), list(views)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e20])
def test_queries_of_any_size(size):
    a = inputs([(1, 400), (3, 200)], 64, gate=False)
    check(a | {"q": (a["q"].float() * size).to(BF16), "softmax_scale": 0.2 / size})


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
def test_one_key_far_above_all_others_is_found(cache):
    a = inputs([(1, 131072)], 64, gate=False, cache=cache)
    page = a["block_table"][0, 1500].item()
    key = (a["q"].view(8, 8, 128).float().mean(1) * 8).to(cache)
    a["k_cache"].view(torch.uint8)[page, :, 11] = key.view(torch.uint8)  # float8 has no indexed assignment
    check(a)


@pytest.mark.gpu
@pytest.mark.parametrize("window, cache, cluster", [
    (None, F8, 0), (None, BF16, 0), (512, F8, 0), (512, BF16, 0), (512, F8, 1), (512, F8, 2), (512, F8, 4),
    (512, F8, 8),
])  # fmt: skip
def test_a_cuda_graph_replays_on_other_lengths(window, cache, cluster):
    a = inputs([(1, 4000)] * 4, 96, cache=cache) | {"window": window}
    launch(*a.values(), cluster=cluster)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(*a.values(), cluster=cluster)
    for lengths, start in (([1, 130, 3999, 64], [0, 1, 2, 3, 4]), ([700, 5, 2000, 0], [0, 3, 3, 4, 4])):
        a["seq_lens"].copy_(torch.tensor(lengths))
        a["query_start"].copy_(torch.tensor(start))
        for _ in range(3):
            graph.replay()
        assert torch.equal(out, launch(*a.values(), cluster=cluster))
        assert relative_error(out, exact(a)) <= MOST_ERROR


def test_the_op_with_a_log_sum_passes_it_to_the_launcher(monkeypatch):
    given = {}

    def launch(*arguments, lse):
        given.update(arguments=arguments, lse=lse.clone())
        lse.fill_(2.0)
        return arguments[0]

    monkeypatch.setattr(paged_attention, "launch", launch)
    q = torch.zeros(3, 8, 128, dtype=BF16)
    out, lse = paged_attention.launch_lse(q, *range(7), 512)
    assert out is q and lse.shape == (3, 8) and (lse == 2).all() and (given["lse"] == -torch.inf).all()
    assert given["arguments"][1:] == (*range(7), 512, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [DRAFTS, [(200, 300)]], ids=["drafts", "prefill"])
def test_the_op_returns_the_log_sum_of_every_kernel(requests):
    a = inputs(requests, 96, window=200)
    out, lse = sk.paged_attention_lse(*a.values())
    wanted, wanted_lse = sk.paged_attention_lse.reference(a["q"].double(), *list(a.values())[1:])
    assert torch.equal(out, sk.paged_attention(*a.values())) and relative_error(out, wanted) <= MOST_ERROR
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=1e-2)


def test_kernel_refuses_what_it_cannot_read():
    a = inputs([(1, 9)], 8, 1, 16)
    assert refuse(*a.values()) is None
    assert "takes q in bfloat16, got float32" in refuse(*(a | {"q": a["q"].float()}).values())
    assert "takes gate in bfloat16, got float32" in refuse(*(a | {"gate": a["gate"].float()}).values())
    f16 = {name: a[name].to(torch.float16) for name in ("k_cache", "v_cache")}
    assert "takes float8_e4m3fn and bfloat16 caches, got float16" in refuse(*(a | f16).values())
    assert "pages of a power of two from 16 on, got 8" in refuse(*inputs([(1, 9)], 8, 1, 8).values())
    narrow = {name: a[name][..., :64] for name in ("q", "k_cache", "v_cache")}
    assert "takes 128 values a head, got 64" in refuse(*(a | narrow).values())
    turned = a["v_cache"].view(torch.uint8).mT.contiguous().mT.view(F8)
    assert "multiples of 16 bytes" in refuse(*(a | {"v_cache": turned}).values())


def test_many_queries_a_request_and_wide_groups_go_to_the_prefill_kernels():
    assert not has_many(torch.empty(8, 8, 128), 1, 2, None) and has_many(torch.empty(10, 8, 128), 1, 2, None)
    assert not has_many(torch.empty(4, 8, 128), 1, 2, None, BF16) and has_many(torch.empty(6, 8, 128), 1, 2, None, BF16)
    assert has_many(torch.empty(5, 8, 128), 1, 2, None)  # one request has more tokens than the other
    assert not has_many(torch.empty(8, 8, 128), 1, 2, 512) and has_many(torch.empty(9, 8, 128), 1, 2, 512)
    assert not has_many(torch.empty(16, 8, 128), 1, 2, 512) and has_many(torch.empty(18, 8, 128), 1, 2, 512)
    assert has_many(torch.empty(16, 8, 128), 1, 2, 2000)  # more keys than a cluster holds
    assert not has_many(torch.empty(8 * 64, 8, 128), 1, 64, 512)  # 128 blocks of 4 tokens x 8 heads
    assert has_many(torch.empty(5 * 65, 8, 128), 1, 65, 512) and has_many(torch.empty(5 * 8, 96, 128), 8, 8, 512)
    assert has_many(torch.empty(1, 17, 128), 1, 1, None) and not has_many(torch.empty(0, 16, 128), 1, 0, None)


def test_a_variant_reads_the_cache_once_for_a_requests_tokens_where_one_can():
    assert [variant(8, tokens) for tokens in (1, 2, 3, 4, 8, 9)] == [8, 16, 32, 32, 32, 32]
    assert [variant(12, tokens) for tokens in (1, 2, 3)] == [16, 32, 32]


def test_most_tiles_is_what_neighbouring_queries_can_touch():
    for window in (1, 2, 63, 64, 65, 66, 512):
        for tokens in (1, 2, 3, 8):
            spans = [
                (first + tokens - 1) // 64 - max(0, first - window + 1) // 64 + 1
                for first in range(window, window + 64)
            ]
            assert most_tiles(window, tokens, 1 << 20) == max(spans)
    assert most_tiles(512, 1, 130) == most_tiles(None, 1, 130) == 3


def test_clusters_hold_a_rows_tiles_and_fill_the_gpu():
    sizes = {batch: cluster_size(batch * 8, most_tiles(512, 1, 1 << 20), 132) for batch in (1, 4, 8, 16, 64)}
    assert sizes == {1: 8, 4: 4, 8: 2, 16: 1, 64: 1}
    assert cluster_size(8, 17, 132) == 0
    assert [cluster_size(20, tiles, 132) for tiles in (5, 11, 12, 13, 16)] == [4, 4, 4, 1, 1]


def test_warpgroups_of_a_row_leave_room_for_the_next_launch():
    assert {batch: warpgroups_for(batch * 8, 132) for batch in (1, 8, 9, 16, 17, 64)} == {
        1: 2, 8: 2, 9: 2, 16: 2, 17: 1, 64: 1,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 96])
def test_rows_of_any_number_of_tiles_reuse_a_ring(heads):
    requests = [(1, 60 + 64 * tiles) for tiles in range(16)] + [(3, 40 + 62 * n) for n in range(16)]
    check(inputs(requests, heads, page_size=16), cluster=1)
