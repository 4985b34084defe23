"""W4A4: its reference and what it costs in accuracy, on CPU; its Triton kernel compiled for Blackwell, never run."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

from step_kernels import nvfp4, w4a4
from step_kernels.testing import nvfp4_weight, relative_error

pytest.importorskip("triton")
from step_kernels.triton import nvfp4_w4a4  # noqa: E402


def decibels(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return -20 * math.log10(relative_error(out, wanted))


@pytest.mark.parametrize("search, w4a16, both", [("max", 20.51, 17.49), ("mse", 21.86, 18.11)])
def test_rounding_gaussian_activations_costs_the_output_three_decibels(search, w4a16, both):
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    scale = nvfp4.global_scale(w.abs().amax())
    codes, scales = nvfp4.quantize(w, scale, nvfp4.search_scales(w, scale, search))
    wanted = x.double() @ w.double().mT
    kept = x @ nvfp4.dequantize(codes, scales, scale).mT
    assert decibels(kept, wanted) == pytest.approx(w4a16, abs=0.02)
    assert decibels(w4a4.nvfp4_linear(x, codes, scales, scale), wanted) == pytest.approx(both, abs=0.02)


def test_the_reference_is_the_product_of_the_two_dequantized_sides():
    weight = nvfp4_weight(32, 64, parts=2, seed=1)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)) * 5
    scale = torch.tensor(x.abs().max().item() / 2688)
    rounded = nvfp4.dequantize(*nvfp4.quantize(x, scale), scale, torch.float64)
    wanted = rounded @ weight.dequantize(torch.float64).mT
    out = w4a4.nvfp4_linear(x, weight.codes, weight.scales, weight.global_scale)
    assert out.shape == (2, 3, 32) and relative_error(out, wanted) < 1e-6


def test_the_activation_scale_maps_amax_to_the_largest_value_and_zeros_to_one():
    assert w4a4.activation_scale(torch.tensor([[1.0, -5376.0]])) == 2.0
    assert w4a4.activation_scale(torch.zeros(2, 16)) == 1.0


def test_an_empty_batch_gives_an_empty_output_and_a_zero_batch_zeros():
    weight = nvfp4_weight(16, 32)
    fields = weight.codes, weight.scales, weight.global_scale
    for linear in (w4a4.nvfp4_linear, nvfp4_w4a4.launch):
        assert linear(torch.empty(0, 32, dtype=torch.bfloat16), *fields).shape == (0, 16)
    assert torch.equal(w4a4.nvfp4_linear(torch.zeros(2, 32), *fields), torch.zeros(2, 16))


def test_w4a4_refuses_unless_the_environment_allows_it(monkeypatch):
    weight = nvfp4_weight(16, 32)
    fields = weight.codes, weight.scales, weight.global_scale
    monkeypatch.delenv("STEP_KERNELS_W4A4", raising=False)
    reason = nvfp4_w4a4.refuse(torch.zeros(1, 32), *fields)
    assert reason == "rounds activations to 4 bits; STEP_KERNELS_W4A4=1 allows that"
    monkeypatch.setenv("STEP_KERNELS_W4A4", "1")
    assert nvfp4_w4a4.refuse(torch.zeros(1, 32), *fields) is None
    assert "got float64" in nvfp4_w4a4.refuse(torch.zeros(1, 32).double(), *fields)


BUILD = """
from step_kernels.triton import build
names = [v[0] for v in build.variants() if v[0].startswith("nvfp4_w4a4")]
assert len(names) == 4, names
for name, served, *variant in build.variants():
    if name.startswith("nvfp4_w4a4"):
        for architecture in served:
            print(architecture, "kind::mxf4nvf4" in build.compile_variant(*variant, architecture, "ptx"))
"""


def test_the_kernel_compiles_to_fp4_tensor_core_instructions_on_every_blackwell():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(run.stdout.splitlines()) == sorted(f"{a} True" for a in (100, 103, 120) for _ in range(4))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 10, reason="needs FP4 tensor cores"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, n, k, parts", [(1, 64, 128, None), (129, 208, 144, 2), (3, 66, 272, 3)])
def test_the_kernel_equals_the_reference_at_odd_sizes(m, n, k, parts, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted, with a plain product in place of dot_scaled
    weight = nvfp4_weight(n, k, parts=parts, device=device)
    weight = dataclasses.replace(
        weight, global_scale=weight.global_scale * torch.arange(1, 1 + (parts or 1)).to(device)
    )
    fields = weight.codes, weight.scales, weight.global_scale.view(parts or ())
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m)).to(device, dtype)[:, ::2]
    error = relative_error(nvfp4_w4a4.launch(x, *fields), w4a4.nvfp4_linear(x.double(), *fields))
    assert error < (3e-3 if dtype == torch.bfloat16 else 1e-6)
