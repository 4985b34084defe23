"""The decode kernels of nvfp4_moe on a GPU: errors under every routing, skipped ids, the clamp, edges, bits, graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import step_kernels as sk
from step_kernels.model.synthetic import RandomWeights
from step_kernels.ops.nvfp4_moe import _nvfp4_moe
from step_kernels.ops.swiglu import swiglu
from step_kernels.testing import nvfp4_weight, relative_error

gpu = pytest.mark.gpu


def experts(count: int, inner: int, hidden: int, parts: int | None = 2) -> sk.NVFP4Experts:
    gate_up = nvfp4_weight(count, 2 * inner, hidden, parts=parts, seed=1, device="cuda")
    if parts:  # gate and up scales that differ by much
        scale = gate_up.global_scale * torch.tensor([1.0, 3.0], device="cuda")
        gate_up = dataclasses.replace(gate_up, global_scale=scale)
    return sk.NVFP4Experts(gate_up, nvfp4_weight(count, hidden, inner, seed=2, device="cuda"))


def routing(tokens: int, count: int, top_k: int, hidden: int, skew: float = 0.0) -> tuple[torch.Tensor, ...]:
    """x, weights, ids without repetition in a token; with `skew` the lower experts are chosen more often."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, count, generator=generator) - skew * torch.linspace(0, 1, count)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights = torch.rand(tokens, top_k, generator=generator)
    return x.cuda(), weights.cuda(), scores.topk(top_k).indices.int().cuda()


def flat(e: sk.NVFP4Experts) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(w, f) for w in (e.gate_up, e.down) for f in ("codes", "scales", "global_scale"))


def rounded_between(x, weights, ids, e: sk.NVFP4Experts, limit: float | None) -> torch.Tensor:
    """The same computation by torch in bf16: swiglu's result is rounded, as tensor cores take it; sums in f32."""
    total = torch.zeros(x.shape, device=x.device)
    for i in range(e.gate_up.shape[0]):
        token, slot = (ids == i).nonzero(as_tuple=True)
        if len(token):
            both = x[token].float() @ e.gate_up[i].dequantize().mT
            inner = swiglu.reference(both, limit).bfloat16()
            total.index_add_(0, token, inner.float() @ e.down[i].dequantize().mT * weights[token, slot, None])
    return total.to(x.dtype)


def cuda(x, weights, ids, ready: sk.NVFP4Experts, limit: float | None = None) -> torch.Tensor:
    """The kernels themselves, with NaN where their outputs will be."""
    pairs, hidden = ids.numel(), x.shape[1]
    for size in (2 * x.numel(), 4 * pairs * hidden, 2 * pairs * 32 * ready.gate_up.codes.shape[1]):
        torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # freed: what the allocator hands out next
    with sk.force("cuda"):
        return sk.nvfp4_moe(x, weights, ids, ready, limit)


def check(arguments: tuple, e: sk.NVFP4Experts, ready: sk.NVFP4Experts, limit: float | None = None):
    x, *rest = arguments
    exact = _nvfp4_moe.reference(x.double(), *rest, *flat(e), limit)
    allowed = 2 * relative_error(rounded_between(*arguments, e, limit), exact) + 2**-8
    got = relative_error(cuda(*arguments, ready, limit), exact)
    assert got <= allowed, (
        f"{list(x.shape)}, ids {list(rest[1].shape)}: relative error {got:.3e}, allowed {allowed:.3e}"
    )


@pytest.fixture(scope="module")
def real() -> tuple[sk.NVFP4Experts, sk.NVFP4Experts]:
    """32 experts of the model's shape, and prepared."""
    e = RandomWeights(torch.device("cuda"), torch.float32).experts("", 32, 1280, 4096)
    scale = e.gate_up.global_scale * torch.tensor([1.0, 1.5], device="cuda")
    e = sk.NVFP4Experts(dataclasses.replace(e.gate_up, global_scale=scale), e.down)
    return e, sk.nvfp4_prepare(e)


@gpu
@pytest.mark.parametrize("skew", [0.0, 2.0])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 16, 33, 64])
def test_errs_no_more_than_torch_at_the_models_shape(real, tokens, skew):
    check(routing(tokens, 32, 8, 4096, skew), *real, 7.0)


@gpu
@pytest.mark.parametrize("inner", [16, 160, 320, 640])
def test_slices_of_a_tensor_parallel_model_err_no_more_than_torch(inner):
    e = experts(12, inner, 1040, parts=None)
    ready = sk.nvfp4_prepare(e)
    for tokens in (1, 2, 6, 24):
        check(routing(tokens, 12, 3, 1040), e, ready, 0.5)


@gpu
def test_all_288_experts_and_all_tokens_to_one(real):
    e = experts(288, 64, 256)
    ready = sk.nvfp4_prepare(e)
    for tokens in (1, 7, 64):
        check(routing(tokens, 288, 8, 256), e, ready)
    x, weights, ids = routing(64, 32, 8, 4096)
    ids[:, 1:] = -1
    for expert in (0, 31):
        ids[:, 0] = expert
        check((x, weights, ids), *real, 7.0)


@gpu
def test_ids_of_other_ranks_add_nothing_and_repeated_ones_count_twice(real):
    x, weights, ids = routing(9, 32, 8, 4096)
    ids[0], ids[1, 1], ids[2, 0], ids[3, 5] = -1, 32, 2**31 - 1, -(2**31)
    ids[4, :4] = 7
    check((x, weights, ids), *real)
    out = cuda(x, weights, ids, real[1])
    assert not out[0].any() and out[1:].any(1).all()
    assert not cuda(x, weights, torch.full_like(ids, 99), real[1]).any()


@gpu
def test_two_tokens_with_every_kind_of_id(real):
    x, weights, ids = routing(2, 32, 8, 4096)
    check((x, weights, ids), *real, 7.0)
    ids[1] = ids[0]  # all experts shared
    check((x, weights, ids), *real, 7.0)
    ids[0, :3], ids[1, 4:] = -5, 5  # skipped, and one expert four times
    check((x, weights, ids), *real, 7.0)
    ids[0] = 400
    check((x, weights, ids), *real)
    assert not cuda(x, weights, ids, real[1])[0].any()
    assert not cuda(x, weights, torch.full_like(ids, -1), real[1]).any()


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 32])
def test_partial_sums_are_absent_again_after_every_call(real, tokens):
    from step_kernels.cuda.nvfp4_linear import partials

    for skew in (0.0, 2.0):
        cuda(*routing(tokens, 32, 8, 4096, skew), real[1], 7.0)
        assert (partials(real[1].down.codes.device) == -1).all()


@gpu
@pytest.mark.parametrize("tokens", [20, 32])
def test_repeated_ids_sort_in_any_order_of_256_pairs(real, tokens):
    x, weights, ids = routing(tokens, 32, 8, 4096)
    ids[:] = torch.randint(-1, 3, ids.shape, generator=torch.Generator().manual_seed(0)).int()
    ids[::5] = 31
    check((x, weights, ids), *real, 7.0)


@gpu
def test_no_tokens_and_no_choices():
    ready = sk.nvfp4_prepare(experts(4, 32, 64))
    x, weights, ids = routing(3, 4, 2, 64)
    assert cuda(x[:0], weights[:0], ids[:0], ready).shape == (0, 64)
    assert not cuda(x, weights[:, :0], ids[:, :0], ready).any()


@gpu
@pytest.mark.parametrize("tokens", [33, 65, 300])
def test_more_pairs_than_a_block_sorts_go_to_the_prefill_kernels(real, tokens):
    check(routing(tokens, 32, 8, 4096), *real, 7.0)


@gpu
def test_a_tokens_nan_stays_with_the_token(real):
    x, weights, ids = routing(20, 32, 8, 4096)
    clean = cuda(x, weights, ids, real[1], 7.0)
    x[3, 17] = torch.nan
    out = cuda(x, weights, ids, real[1], 7.0)
    others = [t for t in range(20) if t != 3]
    assert out[3].isnan().all() and torch.equal(out[others], clean[others])


@gpu
def test_views_give_the_bits_of_their_copies(real):
    x, weights, ids = routing(8, 32, 8, 4096)
    wanted = cuda(x, weights, ids, real[1])
    wide = torch.cat((x, x), 1)[:, :4096]
    assert torch.equal(cuda(wide, weights.T.contiguous().T, ids.T.contiguous().T, real[1]), wanted)
    assert torch.equal(cuda(torch.cat((x[:, :1], x), 1)[:, 1:], weights, ids, real[1]), wanted)


@gpu
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_gives_the_same_bits_on_every_run_and_in_graphs(real, tokens):
    x, weights, ids = routing(tokens, 32, 8, 4096)
    first = sk.nvfp4_moe(x, weights, ids, real[1], 7.0)
    for _ in range(20):
        assert torch.equal(sk.nvfp4_moe(x, weights, ids, real[1], 7.0), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sk.nvfp4_moe(sk.nvfp4_moe(x, weights, ids, real[1], 7.0), weights, ids, real[1], 7.0)
    for shift in (0, 1, 5):
        ids.copy_((ids + shift) % 32)
        graph.replay()
        inner = sk.nvfp4_moe(x, weights, ids, real[1], 7.0)
        assert torch.equal(out, sk.nvfp4_moe(inner, weights, ids, real[1], 7.0))
