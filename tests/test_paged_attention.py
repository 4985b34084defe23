"""paged_attention: against loops in Python floats and torch's SDPA; windows, pages, gates, leaks, errors."""

from __future__ import annotations

import math
from operator import mul

import pytest
import torch
import torch.nn.functional as F

import step_kernels as sk
from step_kernels.testing import relative_error

OP = torch.ops.step_kernels.paged_attention.default
F8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, PAGE, PAGES = 6, 2, 4, 4, 24
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# (new tokens, tokens with those): prefill, decode over two pages and more, chunked prefill, no new token, nothing
MIXED = [(5, 5), (1, 9), (1, 1), (3, 14), (0, 6), (0, 0), (4, 4)]


def inputs(requests=MIXED, cache: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> dict:
    """Random caches; every request has pages of its own in shuffled order, and -1 after its last."""
    g = torch.Generator().manual_seed(5)
    shuffled = torch.randperm(PAGES - 1, generator=g).tolist()  # the last page, which -1 would reach, stays out
    width = max(-(-length // PAGE) for _, length in requests) + 1
    table = [[shuffled.pop() for _ in range(-(-length // PAGE))] for _, length in requests]
    tokens = [new for new, _ in requests]
    return {
        "q": torch.randn(sum(tokens), HEADS, DIM, generator=g).to(dtype),
        "k_cache": (torch.randn(PAGES, KV_HEADS, PAGE, DIM, generator=g)).to(cache),
        "v_cache": (torch.randn(PAGES, KV_HEADS, PAGE, DIM, generator=g)).to(cache),
        **dict.fromkeys(("k_scale", "v_scale"), torch.tensor(1.0)),
        "block_table": torch.tensor([row + [-1] * (width - len(row)) for row in table], dtype=torch.int32),
        "seq_lens": torch.tensor([length for _, length in requests], dtype=torch.int32),
        "query_start": torch.tensor([0, *torch.tensor(tokens).cumsum(0)], dtype=torch.int32),
        **dict.fromkeys(("window", "gate", "softmax_scale")),
    }


def call(a: dict) -> torch.Tensor:
    return sk.paged_attention(*a.values())


def loop(a: dict) -> torch.Tensor:
    """The same by row, head and key in Python floats."""
    out = torch.zeros(a["q"].shape, dtype=torch.float64)
    k_scale, v_scale = (a[n].double().expand(KV_HEADS)[:, None, None] for n in ("k_scale", "v_scale"))
    k_cache, v_cache = a["k_cache"].double(), a["v_cache"].double()
    if a["k_cache"].dtype == F8:
        k_cache, v_cache = k_cache * k_scale, v_cache * v_scale
    table, start = a["block_table"].tolist(), a["query_start"].tolist()
    for request, length in enumerate(a["seq_lens"].tolist()):
        for row in range(start[request], start[request + 1]):
            position = length - (start[request + 1] - row)
            seen = range(max(0, position - (a["window"] or 10**9) + 1), position + 1)
            for h in range(HEADS):
                query, group = a["q"][row, h].double().tolist(), 0 if h < HEADS / KV_HEADS else 1
                where = [(table[request][j // PAGE], j % PAGE) for j in seen]
                scale = a["softmax_scale"] or 1 / math.sqrt(DIM)
                scores = [math.exp(scale * sum(map(mul, query, k_cache[p, group, o].tolist()))) for p, o in where]
                for (p, o), score in zip(where, scores):
                    share = score / sum(scores)
                    if a["gate"] is not None:
                        share /= 1 + math.exp(-a["gate"][row, h].item())
                    out[row, h] += share * v_cache[p, group, o]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5])
@pytest.mark.parametrize("gated", [False, True])
def test_a_mixed_batch_over_shuffled_pages_equals_a_loop_over_keys(window, gated):
    a = inputs(dtype=torch.float64) | {"window": window}
    if gated:
        a |= {"gate": torch.randn(a["q"].shape[0], HEADS) * 3, "softmax_scale": 0.3}
    assert relative_error(call(a), loop(a)) < 1e-13
    a["q"] = a["q"].float()
    assert relative_error(call(a), loop(a)) < 1e-6


@pytest.mark.parametrize("scale", [torch.tensor([0.5, 0.75]), torch.tensor([[2.0, 0.25], [0.1, 3.0]])])
def test_e4m3_caches_are_multiplied_by_their_scales_and_others_are_not(scale):
    scales = {"k_scale": scale[0], "v_scale": scale[1]}
    a = inputs(cache=F8, dtype=torch.float64) | scales
    assert relative_error(call(a), loop(a)) < 1e-13
    plain = inputs(cache=torch.bfloat16)
    assert torch.equal(call(plain | scales), call(plain))


def test_512_keys_of_a_long_prompt_equal_sdpa_with_a_band_mask():
    length = 700
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(h, length, DIM, generator=g) for h in (HEADS, KV_HEADS, KV_HEADS))
    mask = torch.ones(length, length).tril().triu(-511).bool()
    wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
    pages = torch.randperm(44, generator=g)
    cache = torch.zeros(2, 44, KV_HEADS, 16, DIM)
    for name, x in enumerate((k, v)):
        cache[name, pages] = F.pad(x, (0, 0, 0, 4)).unflatten(1, (44, 16)).transpose(0, 1)
    one, seq_lens = torch.tensor(1.0), torch.tensor([length], dtype=torch.int32)
    for new in (length, 130, 1):
        start = torch.tensor([0, new], dtype=torch.int32)
        out = sk.paged_attention(q[:, -new:].transpose(0, 1), *cache, one, one, pages[None].int(), seq_lens, start, 512)
        torch.testing.assert_close(out.transpose(0, 1), wanted[:, -new:])


def test_equal_scores_average_the_values_seen():
    a = inputs([(1, 7)]) | {"window": 5}
    a["q"] = torch.zeros_like(a["q"])
    first, last = a["block_table"][0, :2].tolist()
    mean = torch.cat((a["v_cache"][first, :, 2:], a["v_cache"][last, :, :3]), 1).mean(1)
    torch.testing.assert_close(call(a)[0], mean.repeat_interleave(3, 0))


def test_nothing_outside_a_requests_window_and_length_is_read():
    a = inputs([(2, 15), (1, 6)]) | {"window": 5}
    clean = call(a)
    kept = a["block_table"].clone()
    a["block_table"][0, :2] = -1  # positions 0 to 7; the first query, at 13, sees 9 and later
    read = [(kept[0, j // PAGE].item(), j % PAGE) for j in range(9, 15)]
    read += [(kept[1, j // PAGE].item(), j % PAGE) for j in range(1, 6)]
    for cache in (a["k_cache"], a["v_cache"]):
        spoilt = torch.full_like(cache, torch.nan)
        for page, offset in read:
            spoilt[page, :, offset] = cache[page, :, offset]
        cache.copy_(spoilt)
    assert torch.equal(call(a), clean)


def test_a_nan_request_spoils_no_other():
    a = inputs()
    clean = call(a)
    a["q"][5] = torch.nan  # the second request's only query
    a["k_cache"][a["block_table"][3, 0]] = a["v_cache"][a["block_table"][3, 0]] = torch.nan
    out = call(a)
    others = [*range(5), 6, *range(10, 14)]
    assert out[5:6].isnan().all() and out[7:10].isnan().all() and torch.equal(out[others], clean[others])


def test_rows_without_keys_or_without_a_request_are_zero():
    a = inputs([(2, 2), (3, 1), (2, 0)])  # the second has two rows before its first token
    a["q"] = torch.cat((a["q"], torch.ones(3, HEADS, DIM)))  # padding past query_start[-1]
    for window in (None, 2):
        out = call(a | {"window": window})
        assert out[[0, 1, 4]].all() and not out[[2, 3, *range(5, 10)]].any()
    assert call(inputs([(0, 4), (0, 0)])).shape == (0, HEADS, DIM)
    none = inputs([(0, 4)])
    none |= {"block_table": none["block_table"][:0], "seq_lens": none["seq_lens"][:0]}
    assert call(none | {"query_start": none["query_start"][:1]}).shape == (0, HEADS, DIM)


def test_half_types_are_computed_in_f32_and_rounded_once():
    a = inputs(dtype=torch.bfloat16, cache=torch.bfloat16) | {"window": 3}
    a["gate"] = torch.randn(a["q"].shape[:2]).bfloat16()
    assert torch.equal(call(a), call(a | {n: a[n].float() for n in ("q", "k_cache", "v_cache", "gate")}).bfloat16())


def test_views_give_the_values_of_their_copies_in_a_contiguous_output():
    a = inputs() | {"gate": torch.randn(HEADS, 14).T}
    both = torch.stack((a["k_cache"], a["v_cache"]), 1)
    views = {"q": a["q"].transpose(0, 1).contiguous().transpose(0, 1), "k_cache": both[:, 0], "v_cache": both[:, 1]}
    views["block_table"] = a["block_table"].T.contiguous().T
    out = call(a | views)
    assert out.is_contiguous() and relative_error(out, call(a | {"gate": a["gate"].contiguous()})) < 1e-6


def test_opcheck_passes():
    a = inputs() | {"window": 3, "gate": torch.randn(14, HEADS), "softmax_scale": 0.5}
    torch.library.opcheck(OP, tuple(a.values()))
    torch.library.opcheck(OP, tuple((inputs() | {"q": torch.randn(HEADS, 14, DIM).transpose(0, 1)}).values()))
    torch.library.opcheck(OP, tuple(inputs(cache=F8).values()), test_utils=NO_SCHEMA_TEST)


def test_the_compiled_call_equals_the_eager_one():
    a = inputs(cache=F8) | {"window": 3, "gate": torch.randn(14, HEADS)}
    compiled = torch.compile(lambda *args: sk.paged_attention(*args) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*a.values()), call(a) * 2)


BAD = [
    ("q: got 5 heads, wanted a multiple of the cache's 2", ValueError, {"q": torch.zeros(14, 5, DIM)}),
    (r"k_cache: got shape .*, wanted \[any, any, any, 8\]", ValueError, {"q": torch.zeros(14, HEADS, 8)}),
    ("v_cache: got bfloat16, wanted float32", TypeError, {"v_cache": torch.zeros(PAGES, 2, PAGE, DIM).bfloat16()}),
    (r"v_scale: got shape \[3\], wanted \[2\]", ValueError, {"v_scale": torch.ones(3)}),
    ("block_table: got int64, wanted int32", TypeError, {"block_table": torch.zeros(7, 4).long()}),
    (r"seq_lens: got shape \[6\], wanted \[7\]", ValueError, {"seq_lens": torch.zeros(6).int()}),
    (r"query_start: got shape \[7\], wanted \[8\]", ValueError, {"query_start": torch.zeros(7).int()}),
    ("window: got 0, wanted at least 1", ValueError, {"window": 0}),
    (r"gate: got shape \[14, 2\], wanted \[14, 6\]", ValueError, {"gate": torch.zeros(14, 2)}),
    ("different devices.*'k_scale': 'meta'", ValueError, {"k_scale": torch.ones((), device="meta")}),
]


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, changed = case
    with pytest.raises(kind, match=message):
        call(inputs() | changed)


@pytest.mark.parametrize("window", [None, 3])
def test_parts_of_the_keys_are_joined_by_the_log_sum_of_exponentials(window):
    """The last four keys of a request and those before them: a window's queries see the rest of theirs alone."""
    a = inputs([(1, 9)]) | {"window": window}
    whole, lse = sk.paged_attention_lse(*a.values())
    assert torch.equal(whole, call(a)) and lse.shape == (1, HEADS)
    scores = torch.einsum(
        "gnd,gkd->gnk",
        a["q"][0].unflatten(0, (KV_HEADS, -1)),
        a["k_cache"][a["block_table"][0, :3].long()].transpose(0, 1).flatten(1, 2)[:, :9],
    ) / math.sqrt(DIM)
    torch.testing.assert_close(lse[0], scores[..., 9 - (window or 9) :].logsumexp(-1).flatten())
    if window is None:
        first = a | {"seq_lens": torch.tensor([4], dtype=torch.int32)}
        rest = a | {"block_table": a["block_table"][:, 1:], "seq_lens": torch.tensor([5], dtype=torch.int32)}
        (x, lse_x), (y, lse_y) = (sk.paged_attention_lse(*part.values()) for part in (first, rest))
        share = torch.sigmoid(lse_x - lse_y)[..., None]
        torch.testing.assert_close(share * x + (1 - share) * y, whole)


def test_log_sum_of_exponentials_is_minus_infinity_without_keys_and_knows_no_gate():
    a = inputs([(3, 1), (1, 2)])
    out, lse = sk.paged_attention_lse(*a.values())
    assert (lse[:2] == -torch.inf).all() and lse[2:].isfinite().all() and not out[:2].any()
    assert torch.equal(sk.paged_attention_lse(*(a | {"gate": torch.randn(4, HEADS)}).values())[1], lse)
    torch.library.opcheck(torch.ops.step_kernels.paged_attention_lse.default, tuple(a.values()))
