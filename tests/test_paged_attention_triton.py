"""paged_attention's Triton kernel against the reference: shapes, windows, splits, pages, leaks, graphs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.testing import assert_close_to_reference, relative_error

pytest.importorskip("triton")
from step_kernels.triton.paged_attention import launch, tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in the interpreter on the CPU
F8, BF16, F16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
# (new tokens, tokens with those)
DECODE = [(1, 70), (1, 1), (1, 133)]
PREFILL = [(40, 40), (21, 90)]
MIXED = [(1, 67), (5, 5), (0, 6), (19, 50), (0, 0), (1, 1), (3, 1), (2, 0)]


def inputs(requests, heads=6, kv_heads=2, dim=32, page_size=16, window=None, dtype=BF16, cache=F8, gate=True) -> dict:
    """Random arguments. Table entries of pages that no query sees are -1, and keys that none sees are NaN."""
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
    shape = (pages, kv_heads, page_size, dim)
    k, v = (torch.randn(shape, generator=g, device=DEVICE).to(cache) for _ in range(2))
    for x in (k, v):
        blank = unseen.to(DEVICE)[:, None, :, None]
        x.copy_(torch.where(blank, torch.nan, x.float()).to(cache))
    scales = (torch.rand(kv_heads, generator=g, device=DEVICE) + 0.5 for _ in range(2))
    tokens = int(new.sum())
    return {
        "q": torch.randn(tokens, heads, dim, generator=g, device=DEVICE).to(dtype),
        "k_cache": k,
        "v_cache": v,
        **dict(zip(("k_scale", "v_scale"), scales)),
        "block_table": table.to(DEVICE),
        "seq_lens": torch.tensor([n for _, n in requests], dtype=torch.int32, device=DEVICE),
        "query_start": torch.tensor([0, *new.cumsum(0)], dtype=torch.int32, device=DEVICE),
        "window": window,
        "gate": torch.randn(tokens, heads, generator=g, device=DEVICE).to(dtype) if gate else None,
        "softmax_scale": None,
    }


def check(a: dict, splits: int | None = None) -> None:
    assert_close_to_reference(lambda *args: launch(*args, splits), sk.paged_attention.reference, *a.values())


@pytest.mark.parametrize("requests", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("heads, kv_heads, dim, page_size", [(3, 1, 32, 4), (2, 2, 96, 64), (24, 2, 128, 16)])
@pytest.mark.parametrize("dtype, cache", [(BF16, F8), (BF16, BF16), (F32, F32)])
@pytest.mark.parametrize("window", [None, 37])
def test_kernel_errs_no_more_than_torch_does(requests, heads, kv_heads, dim, page_size, dtype, cache, window):
    check(inputs(requests, heads, kv_heads, dim, page_size, window, dtype, cache))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("cache", [F8, BF16, F16, F32])
def test_every_pair_of_types_errs_no_more_than_torch_does(dtype, cache):
    check(inputs([(1, 9), (4, 30)], 8, 1, 64, 32, 20, dtype, cache))


@pytest.mark.parametrize("window", [1, 3, 16, 64, 65, 10**12])
def test_windows_of_less_and_more_than_a_page_and_a_tile(window):
    check(inputs([(1, 200), (70, 140)], 4, 4, 32, 16, window))


@pytest.mark.parametrize("page_size, dim, heads", [(1, 8, 2), (5, 20, 2), (48, 40, 34), (128, 256, 2)])
def test_pages_and_heads_of_odd_sizes(page_size, dim, heads):
    for cache in (F8, F32):
        check(inputs([(1, 60), (9, 31)], heads, 2, dim, page_size, 25, BF16, cache))


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("window", [None, 100])
def test_split_keys_are_combined_whatever_share_of_them_is_empty(splits, window):
    check(inputs([*MIXED, (1, 300)], 3, 1, window=window, gate=window is None), splits)
    check(inputs([(1, 1), (1, 0)], 3, 1, cache=F32, dtype=F32), splits)


def test_kernel_repeats_its_bits():
    a = inputs([(1, 300), (3, 90)])
    for splits in (1, 4):
        assert torch.equal(launch(*a.values(), splits), launch(*a.values(), splits))


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_without_keys_or_without_a_request_are_zero(splits):
    a = inputs([(2, 2), (3, 1), (2, 0)], gate=False)  # the second has two rows before its first token
    a["q"] = torch.cat((a["q"], torch.ones_like(a["q"][:3])))  # padding past query_start[-1]
    for window in (None, 2):
        out = launch(*(a | {"window": window}).values(), splits)
        assert out[[0, 1, 4]].all() and not out[[2, 3, *range(5, 10)]].any()
    none = a | {"block_table": a["block_table"][:0], "seq_lens": a["seq_lens"][:0], "query_start": a["query_start"][:1]}
    assert not launch(*none.values(), splits).any()
    assert launch(*(inputs([(0, 4), (0, 0)])).values()).shape == (0, 6, 32)


def test_more_requests_than_are_scanned_at_once():
    requests = [(index % 3, 3 + index % 5) for index in range(300)]
    a = inputs(requests, 1, 1, 16, 4)
    assert relative_error(launch(*a.values(), 1), sk.paged_attention.reference(*a.values())) < 3e-3


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_every_e4m3_code_comes_out_as_its_value(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 2, 1, 128).view(F8)
    a = inputs([(1, 1)], 2, 2, 128, 1, dtype=dtype, gate=False)
    a |= {"v_cache": codes, "v_scale": torch.tensor(0.5, device=DEVICE)}
    wanted = codes.float().view(1, 2, 128) * 0.5
    torch.testing.assert_close(launch(*a.values()).float(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e20, 3e37])
def test_queries_of_any_size_meet_e4m3_keys(size):
    a = inputs([(1, 40), (7, 20)], gate=False)
    a |= {"q": (a["q"].float() * size).to(BF16), "softmax_scale": 0.2 / size}
    check(a)


def test_a_nan_request_spoils_no_other():
    a = inputs(MIXED, cache=BF16)
    clean = launch(*a.values())
    a["q"][5] = torch.nan  # of the second request, whose rows are 1 to 5
    a["k_cache"][a["block_table"][3, 1].item()] = torch.nan  # the fourth, rows 6 to 24
    for splits in (1, 3):
        out = launch(*a.values(), splits)
        others = [*range(5), *range(25, len(out))]
        assert out[5].isnan().all() and out[6:25].isnan().all()
        torch.testing.assert_close(out[others], clean[others], rtol=0.01, atol=1e-4)


def test_views_give_the_bits_of_their_copies():
    a = inputs(MIXED, cache=BF16)
    both = torch.stack((a["k_cache"], a["v_cache"]), 2)
    views = {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}
    views |= {name: a[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "block_table", "gate")}
    views["k_scale"] = torch.stack((a["k_scale"], a["v_scale"]), 1)[:, 0]
    views["seq_lens"] = a["seq_lens"].repeat_interleave(2)[::2]
    out = launch(*(a | views).values())
    assert out.is_contiguous() and torch.equal(out, launch(*a.values()))
    apart = {name: torch.stack((a[name], a[name]), -1)[..., 0] for name in ("q", "block_table")}
    assert torch.equal(launch(*(a | apart).values()), out)


def test_kernel_refuses_what_it_cannot_read():
    def table(**changed):
        return registry.table("paged_attention", *(inputs(DECODE) | changed).values(), capability=90)

    a = inputs(DECODE)
    assert "triton       serves" in table()
    assert "takes q in bfloat16, float16 or float32, got float64" in table(q=a["q"].double())
    assert "takes gate in bfloat16, float16 or float32, got float64" in table(gate=a["gate"].double())
    cache = a["v_cache"].view(torch.uint8).mT.contiguous().mT.view(F8)
    assert "whose last dimension has stride 1, got 16 in v_cache" in table(v_cache=cache)
    wide = inputs([(1, 1)], 1, 1, 257)
    assert "takes 1 to 256 values a head, got 257" in registry.table("paged_attention", *wide.values(), capability=90)
    many = inputs([(1, 1)], 33, 1)
    assert "up to 32 query heads a kv head, got 33" in registry.table("paged_attention", *many.values(), capability=90)


SHARED = """
import triton
from triton.backends.compiler import GPUTarget
from step_kernels.triton.paged_attention import ahead_of_time

for kernel, types, constants, warps in ahead_of_time():
    if types.get("k_ptr") == "*bf16":
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in types}
        del attributes[kernel.arg_names.index("softmax_scale"),]
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": warps, "num_stages": 5}
        print(triton.compile(source, target=GPUTarget("cuda", 120, 32), options=options).metadata.shared)
"""


def test_bf16_tiles_which_are_the_largest_fit_the_99_kib_of_shared_memory_of_sm_120():
    a = inputs([(1, 1)], 12, 1, 128)
    assert {tile(a["q"], a["k_cache"], new)["num_stages"] for new in (1, 10)} == {5}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SHARED], env=environment, capture_output=True, text=True)
    sizes = [int(line) for line in run.stdout.splitlines()]
    assert len(sizes) == 2 and 32 << 10 < max(sizes) <= 99 << 10, run.stderr[-2000:]


# The real sizes: 64 query heads in a full layer, 96 in a sliding one, on 8 kv heads.
LONG_DECODE = [(1, length) for length in (1, 9000, 64, 4097, 512, 513, 8191, 2)]
LONG_MIXED = [(1, 9000), (300, 8000), (64, 64), (0, 100), (1, 1), (2, 513)]


def real(requests, heads, window, cache=F8) -> dict:
    return inputs(requests, heads, 8, 128, 64, window, BF16, cache)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, BF16])
@pytest.mark.parametrize("heads, window", [(64, None), (96, 512)])
@pytest.mark.parametrize("requests", [LONG_DECODE, LONG_MIXED, [(1500, 1500)]], ids=["decode", "mixed", "prefill"])
def test_op_on_the_gpu_errs_by_less_than_a_rounding_and_repeats_its_bits(requests, heads, window, cache):
    a = real(requests, heads, window, cache)
    with sk.force("triton"):
        assert_close_to_reference(sk.paged_attention, sk.paged_attention.reference, *a.values())
        out = sk.paged_attention(*a.values())
        assert all(torch.equal(sk.paged_attention(*a.values()), out) for _ in range(5))
    exact = sk.paged_attention.reference(*(a | {"q": a["q"].double()}).values())
    assert relative_error(out, exact) <= 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, cache", [(F32, F32), (F32, F8), (F16, F8), (F16, F16), (BF16, F16)])
@pytest.mark.parametrize("splits", [1, 3])
def test_other_types_and_odd_pages_on_the_gpu(dtype, cache, splits):
    check(inputs([*MIXED, (1, 300)], 24, 2, 96, 48, 37, dtype, cache), splits)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, window", [(64, None), (96, None), (96, 512)])
def test_one_request_of_131072_tokens(heads, window):
    a = real([(1, 131072)], heads, window)
    exact = sk.paged_attention.reference(*(a | {"q": a["q"].double()}).values())
    for splits in (None, 1):
        assert relative_error(launch(*a.values(), splits), exact) <= 3e-3, f"splits {splits}"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 512])
def test_a_cuda_graph_replays_on_other_lengths_and_other_shares_of_the_rows(window):
    a = real([(1, 4000)] * 4, 96, None) | {"window": window}
    sk.paged_attention(*a.values())  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sk.paged_attention(*a.values())
    for lengths, start in (([1, 130, 3999, 64], [0, 1, 2, 3, 4]), ([700, 5, 2000, 0], [0, 3, 3, 4, 4])):
        a["seq_lens"].copy_(torch.tensor(lengths))
        a["query_start"].copy_(torch.tensor(start))
        graph.replay()
        assert torch.equal(out, sk.paged_attention(*a.values()))
        exact = sk.paged_attention.reference(*(a | {"q": a["q"].double()}).values())
        assert relative_error(out, exact) <= 3e-3


@pytest.mark.gpu
def test_registry_serves_cuda_tensors_by_triton():
    table = registry.table("paged_attention", *inputs(DECODE).values()).splitlines()
    assert ["triton", "serves"] in map(str.split, table) and ["reference", "serves"] not in map(str.split, table)
