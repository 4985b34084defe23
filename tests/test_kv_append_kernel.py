"""kv_append's Triton kernel against the reference and float64: in the interpreter, and as the op on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.ops.kv_append import rope
from step_kernels.ops.rms_norm import normalized
from step_kernels.testing import relative_error

pytest.importorskip("triton")
from step_kernels.triton import kv_append as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in the interpreter on the CPU
OP = torch.ops.step_kernels.kv_append.default
F8 = torch.float8_e4m3fn
CACHES = ("k_cache", "v_cache")
SHAPES = [(6, 4, 2, 8, 4), (5, 12, 8, 128, 64), (3, 3, 1, 40, 40), (2, 1, 1, 300, 0), (1, 7, 7, 16, 2)]
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def launch(a: dict) -> torch.Tensor:
    return kernel.launch(*a.values())


def step_inputs(tokens, heads, kv_heads, dim, rotary, dtype=torch.bfloat16, cache=F8, page=16, device=DEVICE) -> dict:
    """Positions up to 262143, every fifth slot negative, q, k, v views of one buffer, K and V of one cache."""
    g = torch.Generator().manual_seed(tokens + rotary)
    pages = tokens // page + 3
    slots = torch.randperm(pages * page, generator=g)[:tokens]
    slots[4::5] = -1 - slots[4::5]
    qkv = (torch.randn(tokens, heads + 2 * kv_heads, dim, generator=g) * 3).to(device, dtype)
    caches = torch.full((pages, 2, kv_heads, page, dim), 7.0).to(device, cache)
    a = dict(zip("qkv", qkv.split((heads, kv_heads, kv_heads), 1)))
    a |= {"q_norm": torch.randn(dim, generator=g) * 0.3, "k_norm": torch.randn(dim, generator=g) * 0.3, "eps": 1e-5}
    a["inv_freq"] = 10000.0 ** -(torch.arange(rotary // 2) * 2 / max(rotary, 1))
    a |= {"positions": torch.randint(0, 262144, (tokens,), generator=g), "slots": slots}
    a |= {"k_cache": caches[:, 0], "v_cache": caches[:, 1]}
    a |= {"k_scale": torch.rand(kv_heads, generator=g) + 0.01, "v_scale": torch.tensor(0.03)}
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in a.items()}


def with_own_caches(a: dict) -> dict:
    return a | {n: a[n].view(torch.uint8).clone().view(F8) if a[n].dtype == F8 else a[n].clone() for n in CACHES}


def assert_errs_no_more(name, out, torchs, wanted):
    error, allowed = relative_error(out, wanted), 2 * relative_error(torchs, wanted) + torch.finfo(out.dtype).eps / 2
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"


def assert_equals_reference(append, a: dict) -> None:
    """q and k by the accuracy rule against f64 (of the f32 angle, as specified), v exactly, e4m3 by code."""
    b = with_own_caches(a)
    out, torchs = append(a), sk.kv_append.reference(*b.values())
    assert out.is_contiguous() and out.dtype == a["q"].dtype
    angle = (a["positions"].float()[:, None, None] * a["inv_freq"]).double()
    q, k = (rope(normalized(a[n].double(), a[f"{n}_norm"], a["eps"]), angle) for n in "qk")
    assert_errs_no_more("q", out, torchs, q)
    kept = a["slots"] >= 0
    page, offset = a["slots"][kept].long() // a["k_cache"].shape[2], a["slots"][kept].long() % a["k_cache"].shape[2]
    if a["k_cache"].dtype != F8:
        assert torch.equal(a["v_cache"], b["v_cache"])
        assert_errs_no_more("k", *(x["k_cache"][page, :, offset] for x in (a, b)), k[kept])
        return
    assert torch.equal(a["v_cache"].view(torch.uint8), b["v_cache"].view(torch.uint8))
    got, wanted = a["k_cache"].float(), b["k_cache"].float()
    # Values of k an f32 ulp apart straddle a tie of e4m3's 4 bits about once in 2^18: then they are a step apart.
    assert (got != wanted).float().mean() < 1e-3
    assert ((got - wanted).abs() <= wanted.abs() / 8 + 2**-9).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernel_norms_rotates_and_writes_as_the_reference(shape):
    for dtype, cache in ((torch.float32, torch.float32), (torch.bfloat16, F8), (torch.float16, torch.bfloat16)):
        assert_equals_reference(launch, step_inputs(*shape, dtype=dtype, cache=cache, page=4))


def test_triton_kernel_takes_pages_of_any_size_and_32_bit_slots():
    for page in (1, 7, 64):
        a = step_inputs(6, 2, 2, 16, 8, page=page)
        a["positions"], a["slots"] = a["positions"].int(), torch.stack((a["slots"].int(),) * 2, 1)[:, 0]
        assert_equals_reference(launch, a)


def test_triton_kernel_reads_and_writes_any_strides():
    a = step_inputs(6, 4, 2, 16, 8)
    a |= {n: a[n].mT.contiguous().mT for n in "qkv"}  # elements apart
    a |= {n: torch.stack((a[n],) * 2, -1)[..., 0] for n in ("q_norm", "k_norm", "inv_freq", "positions")}
    a |= {n: a[n].view(torch.uint8).transpose(0, 3).contiguous().transpose(0, 3).view(F8) for n in CACHES}
    a["k_scale"] = a["k_scale"].repeat_interleave(2)[::2]
    assert_equals_reference(launch, a)


def test_triton_kernel_reduces_angles_of_262143_radians_exactly():
    a = step_inputs(8, 1, 1, 2, 2, dtype=torch.float32, cache=torch.float32)
    a["positions"] = torch.tensor([0, 1, 710, 99_999, 105_616, 131_071, 262_142, 262_143], device=DEVICE)
    a["q"], a["q_norm"] = torch.tensor([1.0, 0.0], device=DEVICE).expand(8, 1, 2), torch.zeros(2, device=DEVICE)
    size = 1 / math.sqrt(0.5 + 1e-5)  # of (1, 0), normed
    wanted = [[size * math.cos(p), size * math.sin(p)] for p in a["positions"].tolist()]
    assert (launch(a).double().cpu()[:, 0] - torch.tensor(wanted).double()).abs().max() < 5e-7


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_triton_kernel_saturates_e4m3_and_keeps_nan():
    a = step_inputs(4, 1, 2, 8, 4, dtype=torch.float32) | {"v_scale": torch.tensor(0.5, device=DEVICE)}
    a["slots"] = torch.arange(4, device=DEVICE)
    a["v"][:, 0, 0] = torch.tensor([1e30, -math.inf, math.nan, 232.5], device=DEVICE)
    assert_equals_reference(launch, a)
    assert a["v_cache"].view(torch.uint8)[0, 0, :4, 0].tolist() == [0x7E, 0xFE, 0x7F, 0x7E]


def test_triton_kernel_writes_only_what_slots_name_and_nothing_beside_its_output():
    a = step_inputs(5, 3, 2, 40, 8, cache=torch.float32)
    launch(a)
    written = [tuple(divmod(s, 16)) for s in a["slots"].tolist() if s >= 0]
    for cache in (a["k_cache"], a["v_cache"]):
        untouched = (cache == 7).all(-1).cpu()  # [pages, kv_heads, page_size]
        assert all(not untouched[page, :, offset].any() for page, offset in written)
        assert (~untouched).sum() == 2 * len(written)
    a["slots"] = -a["slots"].abs() - 1
    before = with_own_caches(a)
    launch(a)
    assert all(torch.equal(a[n], before[n]) for n in CACHES)


def test_triton_kernel_of_no_tokens_writes_nothing():
    a = step_inputs(5, 3, 2, 8, 4)
    a |= {n: a[n][:0] for n in ("q", "k", "v", "positions", "slots")}
    assert launch(a).shape == (0, 3, 8) and (a["k_cache"].float() == 7).all()


def test_triton_refuses_float64():
    a = step_inputs(2, 2, 2, 8, 4)
    assert "triton       serves" in registry.table("kv_append", *a.values(), capability=80)
    wide = a | {n: a[n].double() for n in "qkv"}
    assert "got q in float64" in registry.table("kv_append", *wide.values(), capability=80)
    wide = a | {"k_norm": a["k_norm"].double()}
    assert "got k_norm in float64" in registry.table("kv_append", *wide.values(), capability=80)


def op_by_triton(a: dict) -> torch.Tensor:
    with sk.force("triton"):
        return sk.kv_append(*a.values())


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [F8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens, heads, rotary", [(1, 64, 64), (1025, 64, 64), (513, 96, 128)])
def test_op_on_the_gpu_equals_the_reference_and_repeats_its_bits(tokens, heads, rotary, cache):
    a = step_inputs(tokens, heads, 8, 128, rotary, cache=cache, page=64)
    first = with_own_caches(a)
    assert_equals_reference(op_by_triton, a)
    out = op_by_triton(first)
    for _ in range(3):
        again = with_own_caches(first)
        assert torch.equal(op_by_triton(again), out)
        assert all(torch.equal(again[n].view(torch.uint8), first[n].view(torch.uint8)) for n in CACHES)


@pytest.mark.gpu
def test_op_on_the_gpu_writes_pages_past_two_billion_elements():
    a = step_inputs(4, 8, 8, 128, 64, page=64)
    pages = 2**31 // (8 * 64 * 128) + 2
    a |= {n: torch.zeros(pages, 8, 64, 128, dtype=torch.uint8, device="cuda").view(F8) for n in CACHES}
    a["slots"] = (pages - 1) * 64 + torch.arange(4, device="cuda")
    op_by_triton(a)
    near = step_inputs(4, 8, 8, 128, 64, page=64) | {"slots": torch.arange(4, device="cuda")}
    op_by_triton(near)
    for n in CACHES:
        assert torch.equal(a[n].view(torch.uint8)[-1, :, :4], near[n].view(torch.uint8)[0, :, :4])


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_op_on_new_tokens():
    a = step_inputs(64, 64, 8, 128, 64, page=64)
    op_by_triton(a)  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op_by_triton(a)
    for name in ("q", "k", "v", "positions", "slots"):
        a[name].copy_(a[name].flip(0))
    b = with_own_caches(a)
    wanted = op_by_triton(b)
    graph.replay()
    assert torch.equal(out, wanted)
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in CACHES)


@pytest.mark.gpu
def test_opcheck_passes_on_the_gpu():
    with sk.force("triton"):
        for cache, utils in ((torch.float32, None), (F8, NO_SCHEMA_TEST)):
            a = with_own_caches(step_inputs(6, 4, 2, 16, 8, cache=cache))
            torch.library.opcheck(OP, tuple(a.values()), **({"test_utils": utils} if utils else {}))
