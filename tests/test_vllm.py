"""The vLLM plugin's arithmetic on objects with vLLM's attributes; test_vllm_layers.py has vLLM's own layers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.integrations import vllm as plugin
from step_kernels.testing import nvfp4_weight, relative_error

EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 3


def weights(experts: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> sk.NVFP4Experts:
    """Experts whose up scales are five times their gate scales, and large enough for the clamp to bite."""
    gate_up = nvfp4_weight(experts, 2 * inner, hidden, parts=2, seed=1)
    gate_up = dataclasses.replace(gate_up, global_scale=gate_up.global_scale * torch.tensor([1.0, 5.0]))
    return sk.NVFP4Experts(gate_up, nvfp4_weight(experts, hidden, inner, seed=2))


def tokens(count: int = 6, experts: int = EXPERTS, hidden: int = HIDDEN):
    generator = torch.Generator().manual_seed(count)
    ids = torch.rand(count, experts, generator=generator).argsort(-1)[:, :TOP_K].int()
    return torch.randn(count, hidden, generator=generator), torch.rand(count, TOP_K, generator=generator), ids


def parameter(data: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(data.clone(), requires_grad=False)


def layer(experts: sk.NVFP4Experts, activation: str = "silu", expert_map=None, **more) -> SimpleNamespace:
    """What our code reads of vLLM's RoutedExperts."""
    gate_up, down = experts.gate_up, experts.down
    return SimpleNamespace(
        w13_weight=parameter(gate_up.codes),
        w13_weight_scale=parameter(gate_up.scales),
        w13_weight_scale_2=parameter(gate_up.global_scale),
        w2_weight=parameter(down.codes),
        w2_weight_scale=parameter(down.scales),
        w2_weight_scale_2=parameter(down.global_scale),
        activation=SimpleNamespace(value=activation),  # an enum in vLLM
        expert_map=expert_map,
        **more,
    )


def tp_slice(experts: sk.NVFP4Experts, rank: int, size: int) -> sk.NVFP4Experts:
    """The rows of gate and of up, and the columns of down, that a tensor-parallel rank holds."""
    inner = experts.down.shape[-1] // size
    rows = slice(rank * inner, (rank + 1) * inner)

    def both(t):
        return torch.cat([half[:, rows] for half in t.chunk(2, 1)], 1)

    def columns(t, per):
        return t[..., rank * inner // per : (rank + 1) * inner // per]

    gate_up, down = experts.gate_up, experts.down
    return sk.NVFP4Experts(
        sk.NVFP4Weight(both(gate_up.codes), both(gate_up.scales), gate_up.global_scale),
        sk.NVFP4Weight(columns(down.codes, 2), columns(down.scales, 16), down.global_scale),
    )


def test_the_views_share_the_parameters_storage_and_keep_both_scales():
    fake = layer(weights())
    views = plugin.experts(fake)
    for weight, stem in ((views.gate_up, "w13"), (views.down, "w2")):
        for field, name in (("codes", "weight"), ("scales", "weight_scale"), ("global_scale", "weight_scale_2")):
            assert getattr(weight, field).data_ptr() == getattr(fake, f"{stem}_{name}").data_ptr()
    assert torch.equal(views.gate_up.global_scale, weights().gate_up.global_scale)
    x, w, ids = tokens()
    assert torch.equal(plugin.routed(fake, x, w, ids.long()), sk.nvfp4_moe(x, w, ids, weights()))
    merged = weights().gate_up.global_scale[:, :1].expand(-1, 2).contiguous()  # gate's for both
    other = dataclasses.replace(weights(), gate_up=dataclasses.replace(weights().gate_up, global_scale=merged))
    assert relative_error(sk.nvfp4_moe(x, w, ids, other), sk.nvfp4_moe(x, w, ids, weights())) > 0.1


def test_experts_laid_out_for_a_gpus_kernels_are_the_same_experts(monkeypatch):
    fake, plain = layer(weights(), "swiglustep"), weights()
    monkeypatch.setattr(plugin, "prepares", lambda device: True)
    before = fake.w13_weight.data_ptr()
    plugin.prepare_experts(fake, torch.float16)  # kernels for bf16 alone read it
    assert fake.w13_weight.data_ptr() == before
    plugin.prepare_experts(fake, torch.bfloat16)
    assert fake.w13_weight.shape == (EXPERTS, 1, 1, 2048) and fake.w2_weight_scale.shape == (EXPERTS, 1, 1, 256)
    restored = sk.nvfp4_restore(plugin.experts(fake))
    for got, wanted in ((restored.gate_up, plain.gate_up), (restored.down, plain.down)):
        for field in ("codes", "scales", "global_scale"):
            assert torch.equal(getattr(got, field).view(torch.uint8), getattr(wanted, field).view(torch.uint8))
    x, w, ids = tokens()
    x = x.bfloat16()
    assert torch.equal(plugin.routed(fake, x, w, ids), sk.nvfp4_moe(x, w, ids, plain, 7.0))


def test_a_negative_block_scale_is_named_by_its_layer(monkeypatch):
    fake = layer(weights(), layer_name="model.layers.3.moe.experts")
    fake.w2_weight_scale.data.view(torch.uint8)[1, 2, 0] |= 0x80
    monkeypatch.setattr(plugin, "prepares", lambda device: True)
    with pytest.raises(ValueError, match=r"model.layers.3.moe.experts: weight.scales: got a negative"):
        plugin.prepare_experts(fake, torch.bfloat16)


def test_swiglustep_clamps_at_seven_and_silu_does_not():
    x, w, ids = tokens()
    clamped, free = (sk.nvfp4_moe(x, w, ids, weights(), limit) for limit in (7.0, None))
    assert relative_error(free, clamped) > 0.1
    assert torch.equal(plugin.routed(layer(weights(), "swiglustep"), x, w, ids), clamped)
    assert torch.equal(plugin.routed(layer(weights(), "swiglustep", swiglu_limit=None), x, w, ids), clamped)
    assert torch.equal(plugin.routed(layer(weights(), "silu", swiglu_limit=None), x, w, ids), free)
    assert plugin.limit(layer(weights(), "swiglustep", swiglu_limit=3.0)) == 3.0


@pytest.mark.parametrize(("activation", "limit"), [("silu", 7.0), ("gelu", None), ("swigluoai", 7.0)])
def test_other_clamps_and_activations_are_refused(activation, limit):
    with pytest.raises(ValueError, match=f"activation: got {activation} with swiglu_limit {limit}"):
        plugin.limit(layer(weights(), activation, swiglu_limit=limit))


def test_expert_parallel_ranks_skip_what_is_not_theirs_and_add_up():
    x, w, ids = tokens()
    ids[0, 0] = -1  # padding: must not be read as the last entry of the map
    total = torch.zeros_like(x)
    for rank in range(2):
        mine = [e for e in range(EXPERTS) if e % 2 == rank]  # round robin
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        local = sk.NVFP4Experts(weights().gate_up[mine], weights().down[mine])
        part = plugin.routed(layer(local, expert_map=expert_map), x, w, ids)
        assert torch.equal(part, sk.nvfp4_moe(x, w, torch.where(ids % 2 == rank, ids // 2, -1), local))
        total += part
    assert relative_error(total, sk.nvfp4_moe(x, w, ids, weights())) < 1e-6


def test_eight_tensor_parallel_slices_of_160_add_up():
    whole = weights(experts=TOP_K, inner=1280)
    x, w, ids = tokens(2, TOP_K)
    slices = [layer(tp_slice(whole, rank, 8), "swiglustep") for rank in range(8)]
    assert slices[3].w13_weight.shape == (TOP_K, 320, HIDDEN // 2) and slices[3].w2_weight_scale.shape[-1] == 10
    total = sum(plugin.routed(s, x, w, ids) for s in slices)
    assert relative_error(total, sk.nvfp4_moe(x, w, ids, whole, 7.0)) < 1e-6


def test_fused_linears_keep_a_global_scale_for_each_part():
    widths = [8192, 1024, 1024]
    scales = torch.tensor([1.0, 2.0, 3.0])
    assert plugin.global_scale(scales, widths).tolist() == [1.0] * 8 + [2.0, 3.0]
    assert plugin.global_scale(torch.tensor([2.0, 2.0, 2.0]), widths).shape == ()
    assert plugin.global_scale(torch.tensor([0.5]), [96]).item() == 0.5


def test_a_scale_that_was_never_loaded_is_named():
    fake = layer(weights(), layer_name="model.layers.3.moe.experts")
    plugin.check_loaded(fake, "w13_weight_scale_2")
    fake.w13_weight_scale_2.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.3.moe.experts.w13_weight_scale_2: got NaN"):
        plugin.check_loaded(fake, "w13_weight_scale_2")


@pytest.mark.parametrize(
    ("capability", "reference_only", "reason"),
    [
        (80, False, None),
        (90, False, None),
        (75, False, "sm_75"),
        (100, False, "sm_100"),
        (120, False, "sm_120"),
        (90, True, "nvfp4_linear has only its reference"),
    ],
)
def test_sm_80_to_sm_90_are_ours_where_a_kernel_of_ours_serves(monkeypatch, capability, reference_only, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(registry, "compute_capability", lambda device: capability)
    monkeypatch.setattr(registry, "reference_only", lambda op, device: reference_only)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="step3p7")))
    got = plugin.refusal(config)
    assert got is None if reason is None else got.startswith(reason)
    config.kernel_config = SimpleNamespace(linear_backend="marlin")
    assert reason or plugin.refusal(config) == "--linear-backend marlin was asked for"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"moe_backend": "marlin"}, "--moe-backend marlin was asked for"),
        ({"all2all_backend": "deepep_low_latency"}, "all2all backend deepep_low_latency"),
        ({"apply_router_weight_on_input": True}, "router weights go onto the input"),
        ({"swiglu_limit": 7.0}, "activation: got silu"),
    ],
)
def test_an_expert_layer_that_our_op_does_not_compute_stays_with_vllm(change, reason):
    found = {"moe_backend": "auto", "all2all_backend": "allgather_reducescatter"} | change
    parallel = SimpleNamespace(use_all2all_kernels=True, all2all_backend=found.pop("all2all_backend"))
    moe = SimpleNamespace(moe_backend=found.pop("moe_backend"), moe_parallel_config=parallel)
    fake = layer(weights(), **({"apply_router_weight_on_input": False, "moe_config": moe} | found))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="step3p5")))
    got = plugin.refusal(config, fake)
    assert got is None if reason is None else got.startswith(reason)
