"""What FlashInfer's GEMM and MoE kernels get. They are stand-ins in plain torch here: none of FlashInfer's own runs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from flashinfer_stand_in import SOURCES, FlashInfer, activations, definition

import step_kernels as sk
import step_kernels.flashinfer
from step_kernels import nvfp4, w4a4
from step_kernels.flashinfer import nvfp4_linear, nvfp4_moe, nvfp4_moe_trtllm
from step_kernels.testing import nvfp4_weight, relative_error


@pytest.fixture
def flashinfer(monkeypatch):
    module = FlashInfer()
    monkeypatch.setattr(step_kernels.flashinfer, "installed", lambda: (0, 7, 2))
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setenv("STEP_KERNELS_W4A4", "1")
    yield module
    if SOURCES:  # what was passed exists in the installed version
        for file, name, positional, keywords in module.calls:
            arguments = definition(file, name).args
            known = [a.arg for a in arguments.args] + [a.arg for a in arguments.kwonlyargs]
            assert len(arguments.args) >= positional and set(keywords) <= set(known), name


@pytest.mark.parametrize("parts", [None, 2])
def test_the_bf16_by_fp4_gemm_gets_the_weight_with_its_global_scales(flashinfer, parts):
    weight = nvfp4_weight(384, 192, parts=parts, seed=3)
    if parts:
        weight = dataclasses.replace(weight, global_scale=weight.global_scale * torch.tensor([1.0, 3.0]))
    fields, x = (weight.codes, weight.scales, weight.global_scale), activations(2, 3, 192)
    assert nvfp4_linear.refuse(x, *fields) is None
    out = nvfp4_linear.launch(x, *fields)
    assert out.shape == (2, 3, 384) and relative_error(out, x.double() @ weight.dequantize(torch.float64).mT) < 3e-3
    nvfp4_linear.launch(x, *fields)
    assert [c[1] for c in flashinfer.calls].count("prepare_bf16_fp4_weights") == (parts or 1)


@pytest.mark.parametrize("parts", [None, 2])
def test_the_fp4_gemm_gets_the_reference_w4a4_operands_and_alpha(flashinfer, parts):
    weight = nvfp4_weight(384, 192, parts=parts, seed=3)
    fields, x = (weight.codes, weight.scales, weight.global_scale), activations(5, 192)
    assert nvfp4_linear.refuse_w4a4(x, *fields) is None
    out = nvfp4_linear.launch_w4a4(x, *fields)
    assert relative_error(out, w4a4.nvfp4_linear(x.double(), *fields)) < 3e-3


@pytest.mark.parametrize("launch", [nvfp4_linear.launch, nvfp4_linear.launch_w4a4])
def test_an_empty_batch_calls_no_gemm(flashinfer, launch):
    weight = nvfp4_weight(64, 64)
    assert launch(activations(0, 64), weight.codes, weight.scales, weight.global_scale).shape == (0, 64)
    assert flashinfer.calls == []


@pytest.mark.parametrize("n, k, dtype", [(96, 64, torch.bfloat16), (64, 48, torch.bfloat16), (64, 64, torch.float16)])
def test_linear_refuses_partial_tiles_and_other_types(n, k, dtype):
    weight = nvfp4_weight(n, k)
    reason = nvfp4_linear.refuse(torch.zeros(1, k, dtype=dtype), weight.codes, weight.scales, weight.global_scale)
    assert reason == ("takes bfloat16, got float16" if dtype == torch.float16 else
                      f"takes n (of each global scale) and k in multiples of 64, got n = {n} and k = {k}")  # fmt: skip


def moe_arguments(experts=3, hidden=128, inner=64, tokens=6, limit=None) -> list:
    gate_up = nvfp4_weight(experts, 2 * inner, hidden, parts=2, seed=1)
    shared = gate_up.global_scale[:, :1].expand(-1, 2).contiguous()
    down = nvfp4_weight(experts, hidden, inner, seed=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts + 1, generator=generator).argsort(-1)[:, :2].int() - 1  # -1: not here
    return [
        activations(tokens, hidden), torch.rand(tokens, 2, generator=generator), ids, gate_up.codes, gate_up.scales,
        shared, down.codes, down.scales, down.global_scale, limit,
    ]  # fmt: skip


def moe_w4a4(x, weights, ids, gate_up, gate_up_scales, gate_up_global, down, down_scales, down_global, limit):
    """The routed sum in f64, both activations rounded to NVFP4."""
    outer, inner = w4a4.activation_scale(x), nvfp4_moe.inner_scale(limit, x.device)
    x = nvfp4.dequantize(*nvfp4.quantize(x, outer), outer, torch.float64)
    gate_up = nvfp4.NVFP4Weight(gate_up, gate_up_scales, gate_up_global).dequantize(torch.float64)
    down, out = nvfp4.dequantize(down, down_scales, down_global, torch.float64), torch.zeros_like(x)
    for t, s in (ids >= 0).nonzero().tolist():
        h = sk.swiglu.reference(gate_up[ids[t, s]] @ x[t], limit).float()
        h = nvfp4.dequantize(*nvfp4.quantize(h, inner), inner, torch.float64)
        out[t] += weights[t, s].double() * (down[ids[t, s]] @ h)
    return out


@pytest.mark.parametrize("limit", [None, 7.0, 1.5])
def test_the_fused_moe_gets_up_before_gate_and_alphas_and_a_clamp_after_silu(flashinfer, limit):
    arguments = moe_arguments(limit=limit)
    assert nvfp4_moe.refuse(*arguments) is None
    out = nvfp4_moe.launch(*arguments)
    assert relative_error(out, moe_w4a4(*arguments)) < 1e-2
    keywords = flashinfer.calls[-1][3]
    assert keywords["use_fused_finalize"] is False  # its atomics change the bits from run to run
    assert keywords["activation_type"] == (3 if limit is None else 7)


@pytest.mark.parametrize("limit, unequal", [(None, False), (None, True), (7.0, False), (1.5, False)])
def test_the_trtllm_moe_gets_shuffled_rows_and_a_scale_each_for_gate_and_up(flashinfer, limit, unequal):
    arguments = moe_arguments(experts=4, inner=128, limit=limit)
    if unequal:
        arguments[5] = arguments[5] * torch.tensor([1.0, 3.0])
    arguments[5] = arguments[5] / 128**0.5
    assert nvfp4_moe_trtllm.refuse(*arguments) is None
    assert relative_error(nvfp4_moe_trtllm.launch(*arguments), moe_w4a4(*arguments)) < 1e-2


def test_trtllm_refuses_what_its_kernels_cannot_compute(flashinfer):
    size = {"experts": 4, "inner": 128}
    unequal = moe_arguments(**size, limit=7.0)
    unequal[5] = unequal[5] * torch.tensor([1.0, 2.0])
    assert nvfp4_moe_trtllm.refuse(*unequal) == "clamps gate and up in one unit, their global scales differ"
    assert "got 128 and 160" in nvfp4_moe_trtllm.refuse(*moe_arguments(experts=4, inner=160))
    assert "got 3 and 2" in nvfp4_moe_trtllm.refuse(*moe_arguments(experts=3, inner=128))
    assert nvfp4_moe_trtllm.refuse(*moe_arguments(**size, tokens=0)) == "takes at least one token"


@pytest.mark.parametrize("limit", [None, 1.5])
def test_w4a4_experts_lose_as_stated_against_the_op(limit):
    arguments = moe_arguments(hidden=512, inner=256, tokens=16, limit=limit)
    arguments[5], arguments[8] = arguments[5] / 512**0.5, arguments[8] / 256**0.5  # activations of unit size
    x, *rest = arguments
    wanted = torch.ops.step_kernels.nvfp4_moe(x.double(), *rest)
    assert relative_error(moe_w4a4(*arguments), wanted) == pytest.approx(0.15, abs=0.02)


def test_moe_refuses_what_its_kernels_cannot_compute(flashinfer, monkeypatch):
    assert "got float32" in nvfp4_moe.refuse(moe_arguments()[0].float(), *moe_arguments()[1:])
    assert "got 128 and 160" in nvfp4_moe.refuse(*moe_arguments(inner=160))  # Step's 1280 over eight ranks
    assert "got 64 and 64" in nvfp4_moe.refuse(*moe_arguments(hidden=64))
    assert nvfp4_moe.refuse(*moe_arguments(tokens=0)) == "takes at least one token"
    unequal = moe_arguments()
    unequal[5] = unequal[5] * torch.tensor([1.0, 2.0])
    assert nvfp4_moe.refuse(*unequal) == "takes one global scale an expert for gate and up, these differ"
    monkeypatch.delenv("STEP_KERNELS_W4A4")
    assert "rounds activations to 4 bits" in nvfp4_moe.refuse(*moe_arguments())


@pytest.mark.parametrize("version, got", [((0, 7, 1), "0.7.1"), (None, "none")])
def test_an_older_flashinfer_serves_nothing(monkeypatch, version, got):
    monkeypatch.setattr(step_kernels.flashinfer, "installed", lambda: version)
    weight = nvfp4_weight(64, 64)
    reason = nvfp4_linear.refuse(activations(1, 64), weight.codes, weight.scales, weight.global_scale)
    assert reason == f"needs flashinfer-python 0.7.2 or later, got {got}"
    for moe in (nvfp4_moe, nvfp4_moe_trtllm):
        assert moe.refuse(*moe_arguments(experts=4, inner=128)) == reason
