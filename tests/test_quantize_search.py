"""The looked-up quantizer against the specification, step_kernels/nvfp4.py, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quantize import search as lookup
from quantize.matrices import quantize_piece
from step_kernels import nvfp4, nvfp4_error

N, K = 96, 1024  # 6,144 blocks


def weights(kind: str) -> torch.Tensor:
    """f32 [N, K]."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=g) * 0.02
    some = torch.rand(N, K, generator=g)
    return {
        "gaussian": w,
        "all magnitudes": torch.randn(N, K, generator=g) * torch.exp2(some * 40 - 30),
        "mostly zero": w * (some > 0.95),  # half of the blocks are zero, and errors tie in many others
        "negative or -0": -(w * (some > 0.95)).abs(),
        "zero": w * 0,
        "outliers": torch.where(some > 0.9999, w * 1e4, w),
        "on the grid": torch.randint(-6, 7, (N, K), generator=g).float(),
        "large": w * 1e5,
        "tiny": w * 1e-6,
    }[kind]


KINDS = (
    "gaussian",
    "all magnitudes",
    "mostly zero",
    "negative or -0",
    "zero",
    "outliers",
    "on the grid",
    "large",
    "tiny",
)


def reference(x: torch.Tensor, scale: torch.Tensor, search: str) -> list[torch.Tensor]:
    scales = nvfp4.search_scales(x, scale, search)
    codes, _ = nvfp4.quantize(x, scale, scales)
    return [codes, scales.view(torch.uint8), nvfp4_error.reference(x, codes, scales, scale)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_looked_up_codes_scales_and_error_are_the_references(kind, search, dtype, monkeypatch):
    monkeypatch.setattr(lookup, "_SLAB", 1000)  # the last slab is smaller
    monkeypatch.setattr(lookup, "_PAIRS", 1 << 30)
    x = weights(kind).clamp(-6e4, 6e4).to(dtype)
    scale = nvfp4.global_scale(x.abs().amax(), search)
    codes, scales, sums = lookup.quantize(x, scale, search)
    wanted_codes, wanted_scales, wanted_sums = reference(x, scale, search)
    assert torch.equal(codes, wanted_codes) and torch.equal(scales, wanted_scales)
    assert torch.allclose(sums, wanted_sums, rtol=1e-12, atol=0)


def test_every_finite_bf16_number_gets_the_references_code_whatever_its_neighbours():
    numbers = torch.arange(0x7F80, dtype=torch.int32).short().view(torch.bfloat16)
    numbers = torch.cat((numbers, -numbers))
    numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))].view(-1, 16)
    outer = torch.tensor(1.0)
    for ours, theirs in zip(lookup.quantize(numbers, outer, "max")[:2], reference(numbers, outer, "max")):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "dtype"), [("gaussian", torch.float32), ("all magnitudes", torch.bfloat16)])
def test_what_is_not_looked_up_is_computed_to_the_references_bytes(kind, dtype):
    x = weights(kind).to(dtype)
    scale = nvfp4.global_scale(x.abs().amax())
    assert lookup.quantize(x, scale, "mse") is None
    for ours, theirs in zip(quantize_piece(x, scale, "mse"), reference(x, scale, "mse")):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)  # codes and scales are integers


@pytest.mark.gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_quantizes_to_the_bytes_of_the_cpu(kind, search):
    x = weights(kind).bfloat16()
    scale = nvfp4.global_scale(x.abs().amax(), search)
    ours, theirs = quantize_piece(x, scale, search), quantize_piece(x.cuda(), scale.cuda(), search)
    assert [int((a != b).sum()) for a, b in zip(ours[:2], theirs[:2])] == [0, 0]
    assert torch.allclose(ours[2], theirs[2], rtol=1e-6, atol=0)  # f32 sums a block
