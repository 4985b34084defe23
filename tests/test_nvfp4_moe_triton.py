"""nvfp4_moe's Triton kernels, in the interpreter or on the GPU: accuracy, skipped ids, tiles, chunks, views, graphs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.model.synthetic import RandomWeights
from step_kernels.testing import assert_close_to_reference, nvfp4_weight, relative_error

pytest.importorskip("triton")
from step_kernels.triton import nvfp4_moe as kernel

OP = torch.ops.step_kernels.nvfp4_moe.default
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels run in the interpreter on the CPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def flat(e: sk.NVFP4Experts) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(w, f) for w in (e.gate_up, e.down) for f in ("codes", "scales", "global_scale"))


def rounding_between(x, weights, ids, *tensors_and_limit):
    """The reference, but swiglu's result rounded to x's dtype: what torch computes in the kernel's own types."""
    *tensors, limit = tensors_and_limit
    gate_up, down = sk.NVFP4Weight(*tensors[:3]), sk.NVFP4Weight(*tensors[3:])
    compute = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape, dtype=compute, device=x.device)
    for e in range(gate_up.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        both = x[token].to(compute) @ gate_up[e].dequantize(compute).mT
        inner = sk.swiglu.reference(both, limit).to(x.dtype).to(compute)
        result = inner @ down[e].dequantize(compute).mT * weights[token, slot, None].to(compute)
        total.index_add_(0, token, result)
    return total.to(x.dtype)


def arguments(tokens, top_k, count, hidden, inner, dtype, *, beyond=0, split=True, limit=None):
    """The op's arguments on DEVICE; ids from -beyond to count - 1 + beyond, a token's distinct."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up = nvfp4_weight(count, 2 * inner, hidden, parts=2 if split else None, seed=1)
    if split:
        gate_up = dataclasses.replace(gate_up, global_scale=gate_up.global_scale * torch.tensor([1.0, 3.0]))
    experts = sk.NVFP4Experts(gate_up, nvfp4_weight(count, hidden, inner, seed=2))
    ids = torch.rand(tokens, count + 2 * beyond, generator=generator).argsort(-1)[:, :top_k].int() - beyond
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    return (*(t.to(DEVICE) for t in (x, weights, ids, *flat(experts))), limit)


def test_triton_refuses_float64():
    args = arguments(2, 2, 3, 32, 16, torch.float64)
    refused = "triton takes bfloat16, float16 and float32, got float64"
    assert refused in " ".join(registry.table("nvfp4_moe", *args, capability=90).split())
    assert "triton serves" in " ".join(registry.table("nvfp4_moe", args[0].float(), *args[1:], capability=90).split())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, top_k, count, hidden, inner, limit",
    [
        (3, 2, 5, 32, 16, None),
        (2, 3, 4, 144, 160, 0.5),
        (9, 8, 9, 32, 16, 7.0),
        (40, 2, 3, 96, 48, 7.0),
        (140, 2, 2, 32, 16, 0.5),
    ],
)  # few pairs, each its own tile; then sorted, of 16, 64 and 128 a tile for the half types
def test_triton_kernels_err_no_more_than_torch_does(tokens, top_k, count, hidden, inner, limit, dtype):
    args = arguments(tokens, top_k, count, hidden, inner, dtype, beyond=2, split=tokens != 3, limit=limit)
    assert_close_to_reference(kernel.launch, rounding_between, *args)


def test_rounding_between_the_products_costs_less_than_rounding_the_output():
    args = arguments(200, 2, 2, 32, 16, torch.bfloat16)
    exact = rounding_between(args[0].double(), *args[1:])
    assert relative_error(kernel.launch(*args), exact) < 1.5 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("tile", [16, 64])
def test_the_tile_table_covers_each_experts_pairs_once_and_marks_the_rest_empty(tile):
    ids = torch.randint(-3, 9, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[ids == 2] = 3  # an expert without tokens costs no tile
    keys = ids.sort().values
    tiles = torch.full((3, 500 // tile + 7), -1, dtype=torch.int32, device=DEVICE)
    kernel._tiles_kernel[(1,)](keys.to(DEVICE), tiles, 500, 7, tiles.shape[1], TILE_M=tile, EXPERTS=8)
    wanted = []
    for e in range(7):
        begin, end = int((keys < e).sum()), int((keys <= e).sum())
        wanted += [[e, at, min(at + tile, end)] for at in range(begin, end, tile)]
    assert tiles.T.tolist() == wanted + [[0, 0, 0]] * (tiles.shape[1] - len(wanted))


@pytest.mark.parametrize("tokens", [6, 60])
def test_triton_kernels_add_exact_zeros_for_skipped_slots(tokens):
    args = arguments(tokens, 3, 5, 32, 16, torch.float32)
    ids = args[2]
    ids[0], ids[1, 1] = torch.tensor([-1, 5, 10_000]), -(2**31)
    ids[2, 0] = 2**31 - 1
    args[1][0] = args[1][1, 1] = torch.nan  # weights of slots that no one reads
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN
    try:
        out = kernel.launch(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not out[0].any() and relative_error(out, rounding_between(*args)) < 1e-6
    ids.fill_(-1)
    assert not kernel.launch(*args).any()


@pytest.mark.parametrize("tokens", [5, 50])
def test_triton_kernels_keep_tokens_apart_and_write_only_their_output(tokens):
    args = arguments(tokens, 2, 5, 48, 32, torch.bfloat16)
    clean = kernel.launch(*args)
    args[0][1] = torch.nan
    out = torch.full((tokens + 2, 48), -7.0, dtype=torch.bfloat16, device=DEVICE)
    gate_up, down = (tuple(t.view(torch.uint8) if t.itemsize == 1 else t for t in args[i : i + 3]) for i in (3, 6))
    kernel._launch(*args[:3], gate_up, down, math.inf, out[1:-1])
    others = torch.arange(tokens) != 1
    assert out[2].isnan().all() and torch.equal(out[1:-1][others], clean[others])
    assert (out[0] == -7).all() and (out[-1] == -7).all()


def test_tokens_in_chunks_give_the_bits_of_all_at_once(monkeypatch):
    args = arguments(50, 3, 4, 32, 16, torch.bfloat16, beyond=1, limit=7.0)
    whole = kernel.launch(*args)
    monkeypatch.setattr(kernel, "_LARGEST", 4 * 3 * 32 * 27)
    assert torch.equal(kernel.launch(*args), whole)


def test_triton_kernels_read_views():
    args = arguments(30, 3, 5, 32, 16, torch.bfloat16)
    wanted = kernel.launch(*args)
    wide = torch.randn(30, 64, device=DEVICE).bfloat16()
    wide[:, 16:48] = args[0]
    for x in (wide[:, 16:48], args[0].T.contiguous().T):
        views = (t.T.contiguous().T for t in args[1:3])
        out = kernel.launch(x, *views, *(t.mT.contiguous().mT if t.dim() > 2 else t for t in args[3:9]), None)
        assert out.is_contiguous() and torch.equal(out, wanted)


def test_triton_kernels_of_nothing_give_nothing_or_zeros():
    x, weights, ids, *rest = arguments(4, 2, 5, 32, 16, torch.bfloat16)
    assert kernel.launch(x[:0], weights[:0], ids[:0], *rest).shape == (0, 32)
    assert not kernel.launch(x, weights[:, :0], ids[:, :0], *rest).any()  # top 0
    none = [t[:0] for t in rest[:6]]
    assert not kernel.launch(x, weights, ids, *none, None).any()  # a rank without experts


def full_size(tokens, count, inner, dtype=torch.bfloat16, limit=7.0):
    """Step's hidden size and top 8, codes random on the device, in checkpoint layout: bf16 would prepare them."""
    experts = RandomWeights(torch.device("cuda"), torch.float32).experts("", count, inner, 4096)
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, 4096, device="cuda", generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, count, device="cuda", generator=generator).topk(8)
    return (x, weights, ids.int(), *flat(experts), limit)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, inner", [(32, 320), (32, 160), (288, 1280), (64, 640)])
@pytest.mark.parametrize("tokens", [1, 4, 17, 200])
def test_op_on_the_gpu_errs_no_more_than_torch_and_repeats_its_bits(tokens, count, inner, dtype):
    args = full_size(tokens, count, inner, dtype)
    with sk.force("triton"):
        assert_close_to_reference(OP, rounding_between, *args)
        first = OP(*args)
        assert all(torch.equal(OP(*args), first) for _ in range(3))


@pytest.mark.gpu
def test_a_long_prompt_is_computed_in_chunks_of_bounded_memory():
    args = full_size(20_000, 32, 160)
    with sk.force("triton"):
        OP(*(a[:9000] if isinstance(a, torch.Tensor) and len(a) == 20_000 else a for a in args))  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = OP(*args)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.5 * 2**30, f"{peak / 2**30:.2f} GiB"  # 2.4 GiB of f32 results at once otherwise
    last = slice(19_900, None)
    assert relative_error(out[last], rounding_between(*(a[last] for a in args[:3]), *args[3:])) < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 1024])
def test_a_cuda_graph_replays_the_kernels_on_new_tokens_and_new_routing(tokens):
    args = full_size(tokens, 64, 640)
    with sk.force("triton"):
        OP(*args)  # compiles them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = OP(*args)
        args[0].copy_(args[0].roll(1, 1))
        args[2].copy_((args[2] * 5 + 3) % 64)
        graph.replay()
        assert torch.equal(out, OP(*args))
    assert relative_error(out, rounding_between(*args)) < 2**-8
