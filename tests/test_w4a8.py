"""W4A8: its reference, what it costs in accuracy, and who may use it; the kernels are test_cuda_nvfp4_w4a8.py's."""

from __future__ import annotations

import math

import pytest
import torch

from step_kernels import nvfp4, registry, w4a8
from step_kernels.cuda import nvfp4_w4a8
from step_kernels.ops.swiglu import swiglu
from step_kernels.testing import nvfp4_weight, relative_error, sample_arguments


def decibels(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return -20 * math.log10(relative_error(out, wanted))


@pytest.mark.parametrize("search, moved, w4a16, both", [("max", 0.0339, 20.51, 20.06), ("mse", 0.0327, 21.86, 21.21)])
def test_rounding_both_sides_to_fp8_moves_gaussian_outputs_by_three_percent(search, moved, w4a16, both):
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    scale = nvfp4.global_scale(w.abs().amax())
    codes, scales = nvfp4.quantize(w, scale, nvfp4.search_scales(w, scale, search))
    wanted, kept = x.double() @ w.double().mT, x.double() @ nvfp4.dequantize(codes, scales, scale, torch.float64).mT
    out = w4a8.nvfp4_linear(x, codes, scales, scale)
    assert relative_error(out, kept) == pytest.approx(moved, abs=2e-4)
    assert decibels(kept, wanted) == pytest.approx(w4a16, abs=0.02)
    assert decibels(out, wanted) == pytest.approx(both, abs=0.02)


def test_rounding_both_products_of_an_expert_moves_its_output_by_six_percent():
    gate_up, down = nvfp4_weight(640, 1024, parts=2, seed=1), nvfp4_weight(1024, 320, seed=2)
    x = (torch.randn(128, 1024, generator=torch.Generator().manual_seed(3)) / 32).double()
    wanted = swiglu.reference(x @ gate_up.dequantize(torch.float64).mT, 7.0) @ down.dequantize(torch.float64).mT
    fields = ((w.codes, w.scales, w.global_scale) for w in (gate_up, down))
    inner = swiglu.reference(w4a8.nvfp4_linear(x, *next(fields)), 7.0).bfloat16().double()
    assert relative_error(w4a8.nvfp4_linear(inner, *next(fields)), wanted) == pytest.approx(0.061, abs=2e-3)


@pytest.mark.parametrize("parts", [None, 2])
def test_the_reference_is_the_product_of_the_two_rounded_sides(parts):
    weight = nvfp4_weight(32, 64, parts=parts, seed=1)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)) * 5
    outer = weight.global_scale.double().repeat_interleave(32 // (parts or 1))
    rounded = w4a8.round_weight(weight.codes, weight.scales, torch.float64) * outer[:, None]
    wanted = w4a8.round_activations(x.double()) @ rounded.mT
    out = w4a8.nvfp4_linear(x, weight.codes, weight.scales, weight.global_scale)
    assert out.shape == (2, 3, 32) and relative_error(out, wanted) < 1e-6


def test_a_row_is_rounded_by_the_power_of_two_that_brings_it_within_448():
    largest = torch.tensor([448.0, 449.0, 1.75, 1.7578125, 224.0, 2.0**100])
    x = torch.stack((largest, torch.full_like(largest, 2.0**-13)), 1)
    # e4m3 steps by 2^-9 where the scale is 1: 2^-13 is then 0, and is kept only below a largest of 28
    assert w4a8.round_activations(x)[:, 1].tolist() == [0, 0, 2.0**-13, 2.0**-13, 0, 0]
    assert w4a8.round_activations(x)[:, 0].tolist() == [448.0, 448.0, 1.75, 1.75, 224.0, 2.0**100]


def test_zero_rows_stay_zero_and_rows_that_are_not_finite_become_nan_alone():
    x = torch.ones(5, 16)
    x[1], x[2, 3], x[3, 4] = 0, torch.inf, torch.nan
    out = w4a8.round_activations(x)
    assert torch.equal(out[[0, 1, 4]], x[[0, 1, 4]]) and out[2:4].isnan().all()
    tiny = torch.full((1, 16), 2.0**-130)
    assert torch.equal(w4a8.round_activations(tiny), tiny) and not w4a8.round_activations(tiny / 2**5).any()


def test_products_of_codes_and_scales_are_rounded_to_four_bits_ties_to_even():
    scales = torch.tensor([[1.0, 1.125, 1.375, 1.75, 448.0, 0.0]]).to(torch.float8_e4m3fn)
    codes = nvfp4.pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 15]).to(torch.uint8).repeat(1, 12))
    rounded = w4a8.round_weight(codes, scales).unflatten(1, (6, 16))[0, :, :8].tolist()
    assert rounded[0] == [0.5, 1, 1.5, 2, 3, 4, 6, -6]
    assert rounded[1] == [0.5625, 1.125, 1.75, 2.25, 3.5, 4.5, 7, -7]  # 1.6875 lies between 1.625 and 1.75
    assert rounded[2] == [0.6875, 1.375, 2, 2.75, 4, 5.5, 8, -8]  # 2.0625 is nearer to 2 than to 2.25
    assert rounded[3] == [0.875, 1.75, 2.5, 3.5, 5, 7, 10, -10]
    assert rounded[4] == [224, 448, 640, 896, 1280, 1792, 2560, -2560]
    assert rounded[5] == [0.0] * 8


def test_small_products_are_rounded_to_multiples_of_a_64th():
    scales = torch.arange(1, 41, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]  # 2^-9 to 0.25
    codes = nvfp4.pack(torch.arange(16).to(torch.uint8).repeat(40, 1))
    exact = nvfp4.dequantize(codes, scales, torch.ones(()))
    error = (w4a8.round_weight(codes, scales) - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, torch.tensor(1 / 128))).all() and error.max() > 1 / 150


def large_calls() -> dict[str, tuple]:
    """Arguments of 8192 tokens, prepared weights, on the meta device."""
    linear, moe = (list(sample_arguments(f"nvfp4_{op}", torch.bfloat16, prepared=True)) for op in ("linear", "moe"))
    linear[0] = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    moe[:3] = linear[0], torch.empty(8192, 8, device="meta"), torch.empty(8192, 8, dtype=torch.int32, device="meta")
    return {"nvfp4_linear": tuple(linear), "nvfp4_moe": tuple(moe)}


@pytest.mark.parametrize("op", ["nvfp4_linear", "nvfp4_moe"])
def test_w4a8_serves_many_tokens_only_where_the_environment_allows_it(op, monkeypatch):
    refuse = nvfp4_w4a8.refuse_linear if op == "nvfp4_linear" else nvfp4_w4a8.refuse_moe
    many, few = large_calls()[op], sample_arguments(op, torch.bfloat16, prepared=True)
    for value in (None, "0"):
        monkeypatch.delenv("STEP_KERNELS_W4A8", raising=False) if value is None else monkeypatch.setenv(
            "STEP_KERNELS_W4A8", value
        )
        assert refuse(*many) == "rounds activations and weights to FP8; STEP_KERNELS_W4A8=1 allows that"
        assert registry.choice(op, 90, *many) == "cuda"
    monkeypatch.setenv("STEP_KERNELS_W4A8", "1")
    assert refuse(*many) is None and registry.choice(op, 90, *many) == "cuda-w4a8"
    assert refuse(*few).startswith("takes at least") and registry.choice(op, 90, *few) == "cuda"
    assert "checkpoint layout" in refuse(*sample_arguments(op, torch.bfloat16))
    assert "got float16" in refuse(many[0].half(), *many[1:])
    assert registry.choice(op, 100, *sample_arguments(op, torch.bfloat16)) != "cuda-w4a8"
