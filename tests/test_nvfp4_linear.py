"""nvfp4_linear: hand-worked and looped products, split scales, views, compile, opcheck, errors; the Triton kernel."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.model.synthetic import RandomWeights
from step_kernels.testing import assert_close_to_reference, nvfp4_weight, relative_error

pytest.importorskip("triton")
from step_kernels.ops.nvfp4_linear import _nvfp4_linear
from step_kernels.triton import nvfp4_linear as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in the interpreter on the CPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

OP = torch.ops.step_kernels.nvfp4_linear.default
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def loop(x: list[list[float]], weight: sk.NVFP4Weight) -> list[list[float]]:
    """x @ W.T in Python floats, element by element from the stored bytes."""
    n, k = weight.shape
    parts = weight.global_scale.reshape(-1).tolist()
    codes, scales = weight.codes.tolist(), weight.scales.float().tolist()

    def element(row: int, column: int) -> float:
        code = codes[row][column // 2] >> (4 if column % 2 else 0) & 15
        return E2M1[code] * scales[row][column // 16] * parts[row * len(parts) // n]

    return [[sum(v * element(j, i) for i, v in enumerate(row)) for j in range(n)] for row in x]


def test_a_hand_worked_product():
    # codes 0x21 -> .5, 1; scales 2 and 4; global .5 -> row 0 = [.5, 1] * 8, [1, 2] * 8; row 1 the negative double
    codes = torch.tensor([[0x21] * 16, [0xCA] * 16], dtype=torch.uint8)
    scales = torch.tensor([[2.0, 4.0], [2.0, 4.0]]).to(torch.float8_e4m3fn)
    weight = sk.NVFP4Weight(codes, scales, torch.tensor(0.5))
    x = torch.arange(32.0)[None]
    # sum over even k of the first half 56, odd 64; second half 184 and 192
    assert sk.nvfp4_linear(x, weight).tolist() == [[0.5 * 56 + 64 + 184 + 2 * 192, -(56 + 2 * 64 + 2 * 184 + 4 * 192)]]


@pytest.mark.parametrize("parts", [None, 2, 4])
def test_products_equal_a_loop_over_the_stored_bytes(parts):
    weight = nvfp4_weight(8, 48, parts=parts, seed=1)
    if parts:  # make the parts' scales differ by much
        weight = dataclasses.replace(weight, global_scale=weight.global_scale * torch.arange(1.0, parts + 1))
    x = torch.randn(3, 48, dtype=torch.float64)
    wanted = torch.tensor(loop(x.tolist(), weight), dtype=torch.float64)
    assert relative_error(sk.nvfp4_linear(x, weight), wanted) < 1e-14
    assert relative_error(sk.nvfp4_linear(x.float(), weight), wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_f32_and_rounded_once(dtype):
    weight = nvfp4_weight(64, 256)
    x = torch.randn(7, 256).to(dtype)
    out = sk.nvfp4_linear(x, weight)
    assert out.dtype == dtype
    exact = sk.nvfp4_linear(x.double(), weight)
    assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-5).all()


def test_leading_dimensions_and_views_keep_the_rows_apart():
    weight = nvfp4_weight(32, 64)
    x = torch.randn(2, 3, 64)
    flat = sk.nvfp4_linear(x.flatten(0, 1), weight)
    assert torch.equal(sk.nvfp4_linear(x, weight), flat.unflatten(0, (2, 3)))
    torch.testing.assert_close(sk.nvfp4_linear(x[1, 2], weight), flat[5])
    torch.testing.assert_close(sk.nvfp4_linear(x.transpose(0, 1), weight), flat.unflatten(0, (2, 3)).transpose(0, 1))
    column_major = sk.NVFP4Weight(
        weight.codes.mT.contiguous().mT, weight.scales.mT.contiguous().mT, weight.global_scale
    )
    assert torch.equal(sk.nvfp4_linear(x, column_major), sk.nvfp4_linear(x, weight))
    for empty in ((0, 64), (2, 0, 64)):
        assert sk.nvfp4_linear(torch.zeros(empty), weight).shape == (*empty[:-1], 32)


def test_a_nan_row_spoils_no_other_row():
    x = torch.randn(4, 64)
    clean = sk.nvfp4_linear(x, nvfp4_weight(32, 64))
    x[2] = torch.nan
    out = sk.nvfp4_linear(x, nvfp4_weight(32, 64))
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("x", [torch.randn(5, 64), torch.randn(64, 5).T, torch.randn(3, 2, 64).transpose(0, 1)])
def test_opcheck_passes(x):
    weight = nvfp4_weight(32, 64, parts=2)
    torch.library.opcheck(OP, (x, weight.codes, weight.scales, weight.global_scale), test_utils=NO_SCHEMA_TEST)


def test_the_compiled_call_takes_a_weight_object():
    weight = nvfp4_weight(32, 64, parts=2)
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x, w: sk.nvfp4_linear(x + 1, w).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), sk.nvfp4_linear(x + 1, weight).relu())


GOOD = nvfp4_weight(32, 64)
X = torch.zeros(2, 64)
BAD = [
    ("x: got int64, wanted bfloat16", TypeError, X.long(), {}),
    (r"x: got shape \[2, 32\], wanted \[\.\.\., 64\]", ValueError, X[:, :32], {}),
    ("weight.codes: got int8, wanted uint8", TypeError, X, {"codes": GOOD.codes.view(torch.int8)}),
    (r"weight.codes: got shape \[1, 32, 32\]", ValueError, X, {"codes": GOOD.codes[None]}),
    ("weight.codes: got k = 56, wanted a multiple of 16", ValueError, X[:, :56], {"codes": GOOD.codes[:, :28]}),
    (r"weight.scales: got shape \[32, 3\], wanted \[32, 4\]", ValueError, X, {"scales": GOOD.scales[:, 1:]}),
    ("weight.scales: got uint8", TypeError, X, {"scales": GOOD.scales.view(torch.uint8)}),
    (r"weight.global_scale: got shape \[5\].*dividing n = 32", ValueError, X, {"global_scale": torch.ones(5)}),
    ("weight.global_scale: got float64", TypeError, X, {"global_scale": torch.tensor(1.0).double()}),
    ("different devices.*'x': 'meta'", ValueError, X.to("meta"), {}),
]


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, x, changed = case
    with pytest.raises(kind, match=message):
        sk.nvfp4_linear(x, dataclasses.replace(GOOD, **changed))


def fields(weight: sk.NVFP4Weight) -> tuple[torch.Tensor, ...]:
    return weight.codes, weight.scales, weight.global_scale


def test_triton_refuses_float64():
    weight = nvfp4_weight(32, 64)
    refused = "triton takes bfloat16, float16 and float32, got float64"
    assert refused in " ".join(registry.table("nvfp4_linear", X.double(), weight, capability=90).split())
    assert "triton serves" in " ".join(registry.table("nvfp4_linear", X, weight, capability=90).split())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32, 64, None), (3, 200, 176, 2), (17, 5, 16, 5), (70, 48, 1040, 3)])
def test_triton_kernel_errs_no_more_than_torch_does(shape, dtype):
    m, n, k, parts = shape
    weight = nvfp4_weight(n, k, parts=parts, device=DEVICE)
    if parts:  # make the parts' scales differ by much
        scale = weight.global_scale * torch.arange(1.0, parts + 1, device=DEVICE)
        weight = dataclasses.replace(weight, global_scale=scale)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
    assert_close_to_reference(kernel.launch, _nvfp4_linear.reference, x, *fields(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 64, 128])  # a tile each
@pytest.mark.parametrize("k", [16, 128])  # with and without masks
def test_every_code_under_every_scale_expands_exactly(k, rows, dtype):
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(256, k // 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, k // 16).view(torch.float8_e4m3fn)
    weight = sk.NVFP4Weight(codes.to(DEVICE), scales.to(DEVICE), torch.ones((), device=DEVICE))
    columns = torch.arange(rows, device=DEVICE) % k
    picked = torch.zeros(rows, k, device=DEVICE, dtype=dtype)
    picked[torch.arange(rows, device=DEVICE), columns] = 1
    out = kernel.launch(picked, *fields(weight))
    is_nan = scales[:, 0].float().isnan().to(DEVICE)
    assert out[:, is_nan].isnan().all()
    assert torch.equal(out[:, ~is_nan].double(), weight.dequantize(torch.float64).T[columns][:, ~is_nan])


def test_splitting_k_adds_the_parts_in_order_and_rounds_once():
    weight = nvfp4_weight(64, 4096, device=DEVICE)
    assert kernel._splits(1, 64, 4096, kernel.TILES[0]) == 4 and kernel._splits(64, 8192, 4096, kernel.TILES[1]) == 4
    assert kernel._splits(1024, 8192, 4096, kernel.TILES[2]) == 1 and kernel._splits(1, 64, 64, kernel.TILES[0]) == 1
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    assert_close_to_reference(kernel.launch, _nvfp4_linear.reference, x, *fields(weight))
    out, exact = kernel.launch(x, *fields(weight)).double(), _nvfp4_linear.reference(x.double(), *fields(weight))
    assert ((out - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps * 0.501 + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernel_reads_strided_rows_and_pieces_of_a_weight(dtype):
    weight = nvfp4_weight(32, 128, device=DEVICE)
    x = torch.randn(6, 4, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for view in (x[::2, 1], x.transpose(0, 1), x[:1, :1].expand(3, 4, 128), x[0].T.contiguous().T, x[0, 0]):
        out = kernel.launch(view, *fields(weight))
        assert out.is_contiguous() and torch.equal(out, kernel.launch(view.contiguous(), *fields(weight)))
    half = sk.NVFP4Weight(weight.codes[::2, 32:], weight.scales[::2, 4:], weight.global_scale)
    whole = sk.NVFP4Weight(half.codes.contiguous(), half.scales.contiguous(), half.global_scale)
    assert torch.equal(
        kernel.launch(x[0, :, 64:], *fields(half)), kernel.launch(x[0, :, 64:].contiguous(), *fields(whole))
    )


def test_triton_kernel_of_no_rows_is_empty_and_of_no_columns_zero():
    weight = nvfp4_weight(32, 64, device=DEVICE)
    for shape in ((0, 64), (2, 0, 64)):
        assert kernel.launch(torch.zeros(shape, device=DEVICE), *fields(weight)).shape == (*shape[:-1], 32)
    empty = (weight.codes[:, :0], weight.scales[:, :0], weight.global_scale)
    assert kernel.launch(torch.zeros(3, 0, device=DEVICE), *empty).tolist() == [[0.0] * 32] * 3


def test_triton_kernel_keeps_nan_in_its_row_and_its_writes_in_its_output():
    weight = nvfp4_weight(40, 64, device=DEVICE)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    clean = kernel.launch(x, *fields(weight))
    x[1] = torch.nan
    out = torch.full((5, 40), -7.0, device=DEVICE)
    tile, scales = kernel.TILE_F32, weight.scales.view(torch.uint8)
    kernel._linear_kernel[(1, 2, 1)](
        x, weight.codes, scales, weight.global_scale.reshape(1), out[1:], 3, 40, 64, 64, 32, 4, 40, 1,
        **tile.constants(64), num_warps=tile.warps,
    )  # fmt: skip
    assert out[2].isnan().all() and torch.equal(out[[1, 3]], clean[[0, 2]]) and (out[[0, 4]] == -7).all()


def test_f32_products_use_no_tf32_on_hopper_and_blackwell():
    code = """
from step_kernels.triton import build
for name, served, *variant in build.variants():
    if name.startswith(("nvfp4_linear fp32", "nvfp4_moe fp32")):
        for architecture in (90, 100):
            assert "tf32" not in build.compile_variant(*variant, architecture, "ptx"), (name, architecture)
            print(name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sum("TILE_K" in line for line in run.stdout.splitlines()) == 3 * 2  # one linear, two of the experts


def checkpoint_weight(n, k):
    """Codes random on the device, in checkpoint layout: that of compute in f32, where bf16 would prepare them."""
    return RandomWeights(torch.device("cuda"), torch.float32).experts("", 1, k, n).down[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 64, 300])
def test_op_on_the_gpu_errs_no_more_than_torch_and_repeats_its_bits(m, dtype):
    weight = checkpoint_weight(8192, 4096)
    x = torch.randn(m, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(m)).to(dtype)
    with sk.force("triton"):
        assert_close_to_reference(_nvfp4_linear, _nvfp4_linear.reference, x, *fields(weight))
        first = sk.nvfp4_linear(x, weight)
        assert all(torch.equal(sk.nvfp4_linear(x, weight), first) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(1024, 4096), (4096, 11264), (4096, 320), (128896, 4096)])
def test_a_cuda_graph_replays_the_kernel_on_new_input(n, k):
    weight = checkpoint_weight(n, k)
    x = torch.randn(5, k, device="cuda").bfloat16()
    with sk.force("triton"):
        sk.nvfp4_linear(x, weight)  # compiles it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sk.nvfp4_linear(x, weight)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(out, sk.nvfp4_linear(x, weight))
    assert relative_error(out, _nvfp4_linear.reference(x, *fields(weight))) < 2**-8
