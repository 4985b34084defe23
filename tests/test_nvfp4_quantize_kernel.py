"""The Triton kernels that quantize to NVFP4 and back: the bits of nvfp4.py on the same device, at every value."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4, registry

pytest.importorskip("triton")
from step_kernels.triton import nvfp4_quantize as kernels
from step_kernels.triton.nvfp4_quantize import dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels run in the interpreter on the CPU
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.step_kernels
ONE = torch.tensor(1.0)
U8 = torch.uint8
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def assert_same_bits(got, wanted):
    for name, a, b in zip(("codes", "scales"), got, wanted):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.is_contiguous()
        different = a.view(torch.uint8) != b.view(torch.uint8)
        assert not different.any(), f"{different.sum()} of {different.numel()} {name} differ"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(16,), (1, 4096), (67, 48), (2, 3, 1280)])
def test_triton_quantizes_to_the_bits_of_the_format(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    # block by block another size, so that every e4m3 scale occurs, those beyond both ends included
    size = 2.0 ** torch.randint(-12, 12, (*shape[:-1], shape[-1] // 16, 1), generator=generator)
    x = (torch.randn(*size.shape[:-1], 16, generator=generator) * size).flatten(-2).to(DEVICE, dtype)
    for outer in (1.0, 0.0137, 3.1e-5):
        outer = torch.tensor(outer, device=DEVICE)
        assert_same_bits(quantize(x, outer), nvfp4.quantize(x, outer))


def test_triton_quantizes_ties_to_the_even_code_and_divides_by_the_rounded_scale():
    x = torch.tensor([[12, -2.5, 3.5, -0.4, 10] + [0.0] * 11, [6.9] * 16], device=DEVICE)
    codes, scales = quantize(x, ONE.to(DEVICE))
    assert codes.tolist() == [[0xA7, 0x84, 0x06, 0, 0, 0, 0, 0], [0x77] * 8]
    assert scales.float().tolist() == [[2], [1.125]]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_triton_quantizes_zero_subnormal_nan_and_infinite_blocks_as_the_format():
    x = torch.ones(8, 32, device=DEVICE)
    x[0], x[1, :16], x[2, 16:] = 0, 0, -0.0
    x[3, 5], x[4, 20], x[5, 31] = torch.nan, torch.inf, -torch.inf
    x[6] = 1e-42
    x[7, ::2] = -1e-38
    for outer in (1.0, 0.0, 1e-38, 3e37, torch.nan):  # not inf: the sign of inf / inf is the processor's
        outer = torch.tensor(outer, device=DEVICE)
        assert_same_bits(quantize(x, outer), nvfp4.quantize(x, outer))


def test_triton_quantizes_views_and_no_elements():
    outer = torch.tensor(0.01, device=DEVICE)
    x = torch.randn(6, 4, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (x[:, 1], x[::2, :, 16:64], x[..., ::2], x.transpose(0, 2)[..., :4, :].mT, x[:, :1].expand(6, 3, 96)):
        view = view[..., : view.shape[-1] // 16 * 16]
        assert_same_bits(quantize(view, outer), nvfp4.quantize(view.contiguous(), outer))
    for shape in ((0, 32), (3, 0)):
        codes, scales = quantize(torch.zeros(shape, device=DEVICE), outer)
        assert codes.shape == (shape[0], shape[1] // 2) and scales.shape == (shape[0], shape[1] // 16)
        assert dequantize(codes, scales, outer, torch.bfloat16).shape == shape


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", FLOATS)
def test_triton_dequantizes_every_code_under_every_scale_to_the_formats_bits(dtype):
    scales = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)[:, None]
    codes = nvfp4.pack(torch.arange(16, dtype=torch.uint8, device=DEVICE)).expand(256, 8)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for outer in (1.0, 0.0137, 1e-38, 1e33):
        outer = torch.tensor(outer, device=DEVICE)
        got, wanted = dequantize(codes, scales, outer, dtype), nvfp4.dequantize(codes, scales, outer, dtype)
        assert torch.equal(got.isnan(), wanted.isnan()) and got.isnan().sum() == 32  # scales 0x7F and 0xFF
        kept = ~wanted.isnan()
        assert torch.equal(got[kept].view(bits), wanted[kept].view(bits))  # -0 included


def test_triton_kernels_write_their_outputs_and_nothing_beside_them():
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outer = torch.tensor(0.5, device=DEVICE)
    codes, scales = (torch.full((7, width), 0xA5, dtype=U8, device=DEVICE) for width in (24, 3))
    kernels._quantize_kernel[(1,)](x, outer, codes[1:], scales[1:], 15, 3, 48, BLOCKS=64)
    values = torch.full((7, 48), -7.0, device=DEVICE)
    kernels._dequantize_kernel[(1,)](codes[1:], scales[1:], outer, values[1:], 15, BLOCKS=64)
    wanted = nvfp4.quantize(x, outer)
    assert torch.equal(codes[1:6], wanted[0]) and torch.equal(scales[1:6], wanted[1].view(U8))
    assert torch.equal(values[1:6], nvfp4.dequantize(*wanted, outer))
    assert all((t[0] == 0xA5).all() and (t[6] == 0xA5).all() for t in (codes, scales))
    assert (values[0] == -7).all() and (values[6] == -7).all()


def test_triton_rows_refuse_float64():
    x, outer = torch.zeros(2, 32), ONE
    assert "triton       serves" in registry.table("nvfp4_quantize", x, outer, capability=80)
    wide = registry.table("nvfp4_quantize", x.double(), outer, capability=80)
    assert "takes bfloat16, float16 and float32, got float64" in wide and "reference    serves" in wide
    codes = *nvfp4.quantize(x, outer), outer
    assert "triton       serves" in registry.table("nvfp4_dequantize", *codes, torch.float16, capability=80)
    wide = registry.table("nvfp4_dequantize", *codes, torch.float64, capability=80)
    assert "gives bfloat16, float16 and float32, got float64" in wide and "reference    serves" in wide


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_ops_on_the_gpu_give_the_references_bits_for_millions_of_values(dtype):
    x = (torch.randn(1021, 4096, generator=torch.Generator().manual_seed(0)) * 3).to("cuda", dtype)
    for outer in (torch.rand(4) * 0.01).cuda():
        with sk.force("triton"):
            got = sk.nvfp4_quantize(x, outer)
            values = sk.nvfp4_dequantize(*got, outer, dtype)
            assert_same_bits(sk.nvfp4_quantize(x, outer), got)
        assert_same_bits(got, nvfp4.quantize(x, outer))
        assert torch.equal(values, nvfp4.dequantize(*got, outer, dtype))


@pytest.mark.gpu
def test_opcheck_passes_on_the_gpu():
    x, outer = torch.randn(6, 64, device="cuda"), ONE.cuda()
    with sk.force("triton"):
        codes, scales = sk.nvfp4_quantize(x, outer)
        torch.library.opcheck(OPS.nvfp4_quantize.default, (x, outer))
        arguments = codes, scales, outer, torch.float16
        torch.library.opcheck(OPS.nvfp4_dequantize.default, arguments, test_utils=NO_SCHEMA_TEST)


@pytest.mark.gpu
def test_a_cuda_graph_replays_both_kernels_on_new_input():
    x, outer = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16), torch.tensor(0.01, device="cuda")

    def both():
        codes, scales = sk.nvfp4_quantize(x, outer)
        return codes, scales, sk.nvfp4_dequantize(codes, scales, outer)

    with sk.force("triton"):
        both()  # compiles them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            *got, values = both()
    x.copy_(x.flip(0))
    graph.replay()
    assert_same_bits(got, nvfp4.quantize(x, outer))
    assert torch.equal(values, nvfp4.dequantize(*got, outer, torch.bfloat16))


PTX = """
import re
from step_kernels.triton import build, kv_append, moe_topk, nvfp4_quantize, rms_norm
for module in (kv_append, moe_topk, nvfp4_quantize, rms_norm):
    ptx = "".join(build.compile_variant(*variant, 90, "ptx") for variant in module.ahead_of_time())
    used = re.findall("(?:div|rcp|sqrt|rsqrt|sin|cos)[.][a-z.]*f32|__cudart_i2opi_f", ptx)
    print(module.__name__.split(".")[-1], *sorted(set(used)))
"""


def test_kernels_divide_as_ieee_demands_and_reduce_angles_by_two_over_pi_to_192_bits():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PTX], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [  # div.full, rsqrt.approx and cos.approx would be the fast ones
        "kv_append __cudart_i2opi_f div.rn.f32 sqrt.rn.f32",
        "moe_topk div.rn.f32",
        "nvfp4_quantize div.rn.f32",
        "rms_norm div.rn.f32 sqrt.rn.f32",
    ]
