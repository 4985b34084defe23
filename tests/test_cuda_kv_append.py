"""The CUDA kernel of kv_append: what it refuses, on the CPU; on a GPU, values, codes, leaks, graphs, order."""

from __future__ import annotations

import math
import re
import shutil
import struct

import pytest
import torch
from test_kv_append_kernel import (
    CACHES,
    F8,
    NO_SCHEMA_TEST,
    OP,
    assert_equals_reference,
    step_inputs,
    with_own_caches,
)

import step_kernels as sk
from step_kernels import registry
from step_kernels.cuda import driver
from step_kernels.cuda import kv_append as kernel
from step_kernels.ops.kv_append import rope
from step_kernels.ops.rms_norm import normalized

gpu = pytest.mark.gpu
BF16 = torch.bfloat16
STEP = [(64, 64), (96, 128)]  # q heads and rotary dims of full and of sliding layers
SHAPES = [(6, 4, 2, 16, 16), (5, 12, 1, 128, 64), (3, 3, 1, 48, 48), (9, 17, 5, 64, 32), (4, 1, 7, 128, 0)]
SHAPES += [(3, 2, 3, 8, 0), (2, 5, 9, 40, 16), (25, 37, 2, 120, 96)]


def launch(a: dict, **how) -> torch.Tensor:
    return kernel.launch(*a.values(), **how)


def codes(a: dict) -> torch.Tensor:
    return torch.stack([a[n].view(torch.uint8) for n in CACHES])


def small(**changed) -> tuple:
    """Arguments on the CPU of a call that the kernel takes, with changes."""
    return tuple((step_inputs(3, 4, 2, 16, 16, device="cpu") | changed).values())


def test_the_cuda_row_is_the_first_from_sm_90_on_and_triton_takes_what_it_refuses():
    pytest.importorskip("cuda.bindings")
    rows = registry.table("kv_append", *small(), capability=90).splitlines()[1:]
    assert [row.split(None, 1) for row in rows[:2]] == [
        ["cuda", "serves"],
        ["triton", "would serve, but an earlier row does"],
    ]
    assert [registry.choice("kv_append", c, *small()) for c in (80, 89, 90, 103, 121)] == [
        "triton", "triton", "cuda", "cuda", "cuda",
    ]  # fmt: skip
    assert registry.choice("kv_append", 90, *small(inv_freq=torch.ones(4))) == "triton"


REFUSED = {
    "takes bfloat16, got float16": {n: torch.zeros(3, h, 16, dtype=torch.float16) for n, h in zip("qkv", (4, 2, 2))},
    "takes norms in bfloat16 and float32, got k_norm in float16": {"k_norm": torch.zeros(16, dtype=torch.float16)},
    "takes float8_e4m3fn and bfloat16 caches, got float32": {n: torch.zeros(3, 2, 16, 16) for n in CACHES},
    "takes a multiple of 8 frequencies, got 4": {"inv_freq": torch.ones(4)},
    "takes fewer than 2^31 slots, got 134217728 pages of 16": {
        n: torch.zeros(1, dtype=torch.uint8).view(F8).expand(2**27, 2, 16, 16) for n in CACHES
    },
    "takes q in whole groups of 8 values, got strides (128, 1, 8), 0 bytes past a multiple of 16": {
        "q": torch.zeros(3, 16, 8, dtype=BF16).mT[:, :4]
    },
    "takes v in whole groups of 8 values, got strides (34, 17, 1), 0 bytes past a multiple of 16": {
        "v": torch.zeros(3, 2, 17, dtype=BF16)[..., :16]
    },
    "takes k in whole groups of 8 values, got strides (32, 16, 1), 4 bytes past a multiple of 16": {
        "k": torch.zeros(98, dtype=BF16)[2:].view(3, 2, 16)
    },
    "takes v_cache in whole groups of 8 values, got strides (512, 256, 16, 1), 2 bytes past a multiple of 8": {
        "v_cache": torch.zeros(3074, dtype=torch.uint8)[2:].view(F8)[:1536].view(3, 2, 16, 16)
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_what_it_would_not_compute_and_says_what_came(reason):
    got = kernel.refuse(*small(**REFUSED[reason]))
    assert got == reason


@pytest.mark.parametrize("dim", [4, 20, 136])
def test_refuses_heads_of_other_sizes(dim):
    a = step_inputs(3, 4, 2, dim, 0, device="cpu")
    assert kernel.refuse(*a.values()) == f"takes multiples of 8 up to 128 values a head, got {dim}"


def test_takes_every_shape_that_is_tested_and_views_of_one_buffer():
    for shape in SHAPES:
        for cache in (F8, BF16):
            assert kernel.refuse(*step_inputs(*shape, cache=cache, device="cpu").values()) is None


def test_few_tokens_spread_over_more_warps_and_many_stay_within_the_resident_blocks():
    tiles = [kernel.TILES.index(kernel.variant(tokens, 64, 8, 132)) for tokens in (1, 33, 34, 66, 67, 8192)]
    assert tiles == [0, 0, 1, 1, 2, 2]
    assert kernel.shape(1, 64, 8, (4, 1), 132) == ((8, 1, 1), 5, 32, 4)
    assert kernel.shape(8192, 64, 8, (8, 4), 132) == ((2, 330, 1), 3, 4, 1)
    assert 0 in kernel.shape(0, 64, 8, (4, 1), 132)[0] and 0 in kernel.shape(3, 0, 0, (4, 1), 132)[0]
    for q_heads, kv_heads in ((64, 8), (96, 8), (1, 1), (13, 3)):
        for chunk, rounds in kernel.TILES:
            (blocks, rows, _), warps, q_warps, k_warps = kernel.shape(9, q_heads, kv_heads, (chunk, rounds), 132)
            assert warps <= 5 and rows == 9 and blocks * warps >= q_warps + 2 * k_warps
            assert q_warps * chunk * rounds >= 2 * q_heads and k_warps * chunk * rounds >= 2 * kv_heads


def test_the_launcher_packs_as_many_bytes_as_the_kernel_reads():
    source = (driver.CSRC / "smxx_kv_append.cu").read_text()
    assert struct.calcsize(kernel._PARAMETERS) == int(re.search(r"sizeof\(Arguments\) == (\d+)", source)[1])


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_the_launchers_variants_are_the_symbols_in_the_cubin():
    cubin, _ = driver.build.compile_with_nvcc(driver.CSRC / "smxx_kv_append.cu", "90a")
    symbols = {name.decode() for name in re.findall(rb"\.text\.(\w+)\0", cubin)}
    assert symbols == {variant.symbol for variant in kernel.VARIANTS.values()}


@gpu
@pytest.mark.parametrize("heads, rotary", STEP)
@pytest.mark.parametrize("tokens", [1, 2, 64, 1025])
@pytest.mark.parametrize("cache", [F8, BF16])
def test_step_layers_equal_the_reference_and_repeat_their_bits(heads, rotary, tokens, cache):
    a = step_inputs(tokens, heads, 8, 128, rotary, cache=cache, page=64)
    first = with_own_caches(a)
    assert_equals_reference(launch, a)
    out = launch(first)
    for _ in range(3):
        again = with_own_caches(first)
        assert torch.equal(launch(again), out) and torch.equal(codes(again), codes(first))


@gpu
@pytest.mark.parametrize("tile", kernel.TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_numbers_of_heads_and_chunks_equal_the_reference(shape, tile):
    for cache in (F8, BF16):
        for page in (1, 7, 64):
            assert_equals_reference(lambda a: launch(a, tile=tile), step_inputs(*shape, cache=cache, page=page))


@gpu
def test_norms_of_both_types_and_indices_of_32_and_64_bits_equal_the_reference():
    for types in ((BF16, torch.float32), (torch.float32, BF16)):
        for indices in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
            a = step_inputs(70, 12, 2, 128, 64)
            a |= {n: a[n].to(dtype) for n, dtype in zip(("q_norm", "k_norm"), types)}
            a |= {n: torch.stack((a[n].to(dtype),) * 2, 1)[:, 0] for n, dtype in zip(("positions", "slots"), indices)}
            assert_equals_reference(launch, a)


@gpu
def test_norms_that_begin_anywhere_and_strided_scales_and_caches_are_read_in_place():
    a = step_inputs(70, 12, 4, 128, 64)
    a |= {n: torch.cat((a[n].to(BF16), a[n][:1].to(BF16)))[1:] for n in ("q_norm", "k_norm")}  # 2 bytes past 16
    a |= {n: torch.stack((a[n],) * 2, -1)[..., 0] for n in ("inv_freq",)}
    a["k_scale"], a["v_scale"] = a["k_scale"].repeat_interleave(2)[::2], a["k_scale"].flip(0).contiguous()
    a |= {n: a[n].view(torch.uint8).transpose(0, 2).contiguous().transpose(0, 2).view(F8) for n in CACHES}
    assert_equals_reference(launch, a)


@gpu
def test_angles_of_any_position_are_rounded_as_float64s():
    g = torch.Generator().manual_seed(5)
    for rotary in (64, 128):
        for low, high in (
            (0, 1024),
            (104_000, 107_000),
            (262_144 - 4096, 262_144),
            (2**20 - 500, 2**20 + 500),
            (2**40,) * 2,
        ):
            a = step_inputs(1024, 8, 8, 128, rotary)
            a["positions"] = torch.randint(low, high + 1, (1024,), generator=g).cuda()
            angle = (a["positions"].float()[:, None, None] * a["inv_freq"]).double()
            wanted = rope(normalized(a["q"].double(), a["q_norm"], a["eps"]), angle).to(BF16)
            # f32's errors of 2^-22 move one value in some thousands past a tie of bf16.
            assert (launch(a) != wanted).float().mean() < 1e-3, f"positions from {low} to {high}"


@gpu
def test_v_over_its_scale_gets_the_references_code_for_every_bf16_and_any_scale():
    g = torch.Generator().manual_seed(1)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16).view(64, 8, 128).cuda()
    special = [0.0, math.inf, math.nan, -0.5, 2.0**-140, 2.0**100, 2.0**-60, 2.0**61]
    for scales in (torch.tensor(special), torch.ones(8), *torch.exp2(torch.rand(8, 8, generator=g) * 24 - 12)):
        a = step_inputs(64, 8, 8, 128, 64, page=64) | {"v": every, "v_scale": scales.cuda()}
        a["slots"] = torch.arange(64, device="cuda")
        b = with_own_caches(a)
        launch(a), sk.kv_append.reference(*b.values())
        got, wanted = a["v_cache"], b["v_cache"]
        nan = wanted.float().isnan()  # its sign is nobody's business
        assert torch.equal(got.float().isnan(), nan)
        wrong = (got.view(torch.uint8) != wanted.view(torch.uint8)) & ~nan
        assert not wrong.any(), f"{int(wrong.sum())} codes differ, of heads {wrong.nonzero()[:, 1].unique().tolist()}"


@gpu
def test_k_saturates_at_448_and_nan_and_infinities_stay_where_the_reference_has_them():
    for heads, rotary in STEP:
        for cache in (F8, BF16):
            a = step_inputs(6, heads, 8, 128, rotary, cache=cache)
            a["slots"] = torch.arange(6, device="cuda")
            a["k_scale"] = torch.full((8,), 1e-3, device="cuda")  # normed values of 1 are 1000
            for n in "qkv":
                a[n][0, 0, 0], a[n][1, 1, 3], a[n][2, -1, 127] = math.nan, math.inf, -math.inf
                a[n][3, 0], a[n][4, -1, 5], a[n][5, 0] = 0.0, 3e38, -0.0
            b = with_own_caches(a)
            out, wanted = launch(a), sk.kv_append.reference(*b.values())
            for got, want in ((out, wanted), *((a[n].float(), b[n].float()) for n in CACHES)):
                assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
                torch.testing.assert_close(got, want, rtol=2**-3 if cache == F8 else 2**-7, atol=1e-6, equal_nan=True)
            assert cache != F8 or a["k_cache"].float()[0].abs().nan_to_num().max() == 448


@gpu
@pytest.mark.parametrize("tile", kernel.TILES, ids=str)
def test_only_the_named_slots_are_written_and_negative_ones_nowhere(tile):
    a = step_inputs(25, 3, 3, 40, 16, cache=BF16)
    launch(a, tile=tile)
    written = [divmod(s, 16) for s in a["slots"].tolist() if s >= 0]
    for cache in (a["k_cache"], a["v_cache"]):
        untouched = (cache == 7).all(-1).cpu()  # [pages, kv_heads, page_size]
        assert all(not untouched[page, :, offset].any() for page, offset in written)
        assert (~untouched).sum() == 3 * len(written)
    for negative in (-1, -(2**31), -(2**40)):
        a["slots"].fill_(negative)
        before = with_own_caches(a)
        launch(a, tile=tile)
        assert all(torch.equal(a[n], before[n]) for n in CACHES)


@gpu
def test_no_tokens_write_nothing():
    a = step_inputs(5, 64, 8, 128, 64)
    a |= {n: a[n][:0] for n in ("q", "k", "v", "positions", "slots")}
    assert launch(a).shape == (0, 64, 128) and (a["k_cache"].float() == 7).all()


@gpu
def test_pages_past_two_billion_elements_are_written():
    near = step_inputs(4, 8, 8, 128, 64, page=64) | {"slots": torch.arange(4, device="cuda")}
    pages = 2**31 // (8 * 64 * 128) + 2
    far = near | {n: torch.zeros(pages, 8, 64, 128, dtype=torch.uint8, device="cuda").view(F8) for n in CACHES}
    far["slots"] = near["slots"] + (pages - 1) * 64
    launch(near), launch(far)
    for n in CACHES:
        assert torch.equal(far[n].view(torch.uint8)[-1, :, :4], near[n].view(torch.uint8)[0, :, :4])


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_inputs_are_those_that_the_kernel_just_ahead_wrote_and_later_launches_win(tokens):
    a = step_inputs(tokens, 64, 8, 128, 64, page=64)
    turns = [{n: torch.randn_like(a[n]) for n in "qkv"} for _ in range(20)]
    wanted = []
    for turn in turns:
        wanted.append(launch(a | turn))
        torch.cuda.synchronize()
    last, outs = codes(a), []
    for _ in range(5):
        for turn in turns:
            for n in "qkv":
                a[n].copy_(turn[n])
            outs.append(launch(a))
    assert all(torch.equal(out, wanted[i % 20]) for i, out in enumerate(outs))
    assert torch.equal(codes(a), last)


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_a_cuda_graph_replays_with_other_tokens_positions_and_slots(tokens):
    def turn(seed):
        g = torch.Generator().manual_seed(seed)
        new = {"positions": torch.randint(0, 262144, (tokens,), generator=g)}
        new["slots"] = torch.randperm(a["k_cache"].shape[0] * 64, generator=g)[:tokens]
        new["slots"][::4] = -1
        return {n: x.cuda() for n, x in new.items()} | {n: torch.randn_like(a[n]) for n in "qkv"}

    a = step_inputs(tokens, 96, 8, 128, 128, page=64)
    with sk.force("cuda"):
        sk.kv_append(*a.values())  # loads it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(2):  # one behind the other in the graph
                out = sk.kv_append(*a.values())
        for seed in range(4):
            b = with_own_caches(a | turn(seed))
            for n in ("q", "k", "v", "positions", "slots"):
                a[n].copy_(b[n])
            wanted = sk.kv_append(*b.values())
            graph.replay()
            assert torch.equal(out, wanted) and torch.equal(codes(a), codes(b))


@gpu
def test_opcheck_passes():
    with sk.force("cuda"):
        for cache, utils in ((BF16, None), (F8, NO_SCHEMA_TEST)):
            a = with_own_caches(step_inputs(6, 4, 2, 16, 16, cache=cache))
            torch.library.opcheck(OP, tuple(a.values()), **({"test_utils": utils} if utils else {}))
