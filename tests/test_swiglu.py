"""swiglu: the reference against hand-worked numbers, the Triton kernel against it, the kernels' roundings."""

import math
import os
import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4, registry
from step_kernels.testing import assert_close_to_reference

pytest.importorskip("triton")
import triton
import triton.language as tl

from step_kernels.triton import numerics
from step_kernels.triton.swiglu import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in the interpreter on the CPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu_of(gate, up, limit=None):
    return sk.swiglu(torch.tensor([gate, up], dtype=torch.float64), limit).item()


def random_rows(*shape, dtype=torch.bfloat16, device=DEVICE):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 4).to(device, dtype)


def test_silu_of_the_gate_multiplies_up():
    assert swiglu_of(0.0, 5.0) == 0.0
    assert swiglu_of(math.log(3.0), 2.0) == pytest.approx(1.5 * math.log(3.0), rel=1e-12)  # sigmoid(ln 3) = 3/4
    assert swiglu_of(-math.log(3.0), 2.0) == pytest.approx(-0.5 * math.log(3.0), rel=1e-12)


def test_gate_is_clamped_after_silu_and_not_before():
    assert swiglu_of(7.0, 1.0, limit=7.0) == pytest.approx(6.993622, abs=1e-6)  # silu(7), which is under the limit
    assert swiglu_of(8.0, 1.0, limit=7.0) == 7.0  # silu(8) = 7.997; clamped before, it would be 6.9936 again


def test_gate_is_clamped_above_only_and_up_on_both_sides():
    assert swiglu_of(100.0, 100.0, limit=7.0) == 49.0
    assert swiglu_of(100.0, -100.0, limit=7.0) == -49.0
    # silu is at least -0.2785, so a lower clamp of the gate shows only under a limit below that.
    assert swiglu_of(-1.0, 0.05, limit=0.1) == pytest.approx(-0.05 / (1 + math.e), rel=1e-12)


def test_gate_comes_first_in_the_last_dimension():
    out = sk.swiglu(torch.tensor([[20.0, 0.0, 2.0, 3.0]]))
    assert out.tolist() == [[40.0, 0.0]]  # sigmoid(20) is 1 in f32


def test_bf16_result_is_the_f32_result_rounded_once():
    x = random_rows(4, 128, device="cpu")
    assert torch.equal(sk.swiglu(x, 7.0), sk.swiglu(x.float(), 7.0).bfloat16())


def test_op_keeps_the_rules_of_torch_library():
    for x in (
        random_rows(3, 10, device="cpu"),
        torch.empty(0, 8),
        random_rows(2, 3, 8, device="cpu")[:, ::2],
        torch.randn(4, 6).t(),
    ):
        for limit in (None, 7.0):
            torch.library.opcheck(torch.ops.step_kernels.swiglu.default, (x, limit))


def test_torch_compile_takes_the_op_without_a_graph_break():
    x = random_rows(3, 10, device="cpu")
    compiled = torch.compile(lambda x: sk.swiglu(x * 2, 7.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sk.swiglu(x * 2, 7.0))


@pytest.mark.parametrize(
    "gate_up, limit, error, message",
    [
        (torch.zeros(2, 5), None, ValueError, "gate_up: got last dimension 5, wanted an even one"),
        (torch.zeros(()), None, ValueError, "gate_up: got shape [], wanted [..., any]"),
        (torch.zeros(2, 4).int(), None, TypeError, "gate_up: got int32, wanted bfloat16 or float16"),
        (torch.zeros(2, 4), 0.0, ValueError, "limit: got 0.0, wanted a positive number"),
        (torch.zeros(2, 4), math.nan, ValueError, "limit: got nan, wanted a positive number"),
    ],
)
def test_wrong_arguments_are_named_with_what_came_and_what_was_wanted(gate_up, limit, error, message):
    with pytest.raises(error) as caught:
        sk.swiglu(gate_up, limit)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_triton_kernel_refuses_float64():
    refused = "takes bfloat16, float16 and float32, got float64"
    assert refused in registry.table("swiglu", torch.zeros(2, 4).double(), capability=90)
    assert "triton       serves" in registry.table("swiglu", torch.zeros(2, 4), capability=90)


# The kernel, on the GPU or in the interpreter.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.25, 7.0])
@pytest.mark.parametrize("shape", [(1, 2), (3, 74), (2, 3, 512), (2, 2560), (2050,)])
def test_triton_kernel_errs_no_more_than_torch_does(shape, limit, dtype):
    assert_close_to_reference(launch, sk.swiglu.reference, random_rows(*shape, dtype=dtype), limit)


def test_triton_kernel_rounds_to_bf16_as_torch_does():
    x = random_rows(8, 2560)
    out, wanted = launch(x, 7.0), sk.swiglu.reference(x, 7.0)
    # Two f32 results an ulp apart straddle a bf16 tie about once in 2^15; truncation would miss half of all.
    assert (out != wanted).float().mean() < 1e-3


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("limit", [None, 2.0])
def test_triton_kernel_passes_nan_and_infinity_as_torch_does(limit):
    values = [math.nan, 1.0, -1.0, math.inf, -math.inf, 0.0, 200.0, -200.0]
    gate, up = (t.flatten() for t in torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij"))
    x = torch.cat([gate, up])[None].to(DEVICE)
    torch.testing.assert_close(launch(x, limit), sk.swiglu.reference(x, limit), equal_nan=True)


def test_triton_kernel_reads_any_strides():
    x = random_rows(6, 4, 80)
    for view in (x[:, :, :74], x[::2], x[..., ::2], x.transpose(0, 1), x[:, 1], x[:, :1].expand(6, 3, 80)):
        out = launch(view, 7.0)
        assert out.is_contiguous() and out.shape == (*view.shape[:-1], view.shape[-1] // 2)
        torch.testing.assert_close(out, sk.swiglu.reference(view, 7.0), rtol=0.01, atol=1e-6)  # a bf16 ulp


def test_triton_kernel_of_no_elements_is_empty():
    for shape in ((0, 8), (3, 0), (0,), (2, 0, 8)):
        assert launch(torch.empty(shape, device=DEVICE)).shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("n", [1, 37, 300])
def test_triton_kernel_writes_its_output_and_nothing_beside_it(n):
    from step_kernels.triton.swiglu import _swiglu_kernel

    x = random_rows(3, 2 * n)
    out = torch.full((5, n), -7.0, dtype=torch.bfloat16, device=DEVICE)
    grid = (1, triton.cdiv(n, 256))
    _swiglu_kernel[grid](x, out[1:], 3, 2 * n, n, 7.0, HAS_LIMIT=True, ROWS=4, BLOCK=256, num_warps=4)
    torch.testing.assert_close(out[1:4], sk.swiglu.reference(x, 7.0), rtol=0.01, atol=1e-6)
    assert (out[0] == -7).all() and (out[4] == -7).all()


@triton.jit
def _round_kernel(x_ptr, bf16_ptr, e4m3_ptr, e2m1_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(bf16_ptr + at, numerics.to_bf16(x))
    tl.store(e4m3_ptr + at, numerics.to_e4m3_bits(x).to(tl.uint8))
    tl.store(e2m1_ptr + at, numerics.to_e2m1(x).to(tl.uint8))


@triton.jit
def _decode_kernel(code_ptr, e4m3_ptr, e2m1_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    code = tl.load(code_ptr + at).to(tl.int32)
    tl.store(e4m3_ptr + at, numerics.from_e4m3_bits(code))
    tl.store(e2m1_ptr + at, numerics.from_e2m1(code & 15))


def rounded(x):
    """f32 -> bf16, e4m3 codes, e2m1 codes, by the kernel."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(DEVICE)
    out = [torch.empty_like(padded, dtype=d) for d in (torch.bfloat16, torch.uint8, torch.uint8)]
    _round_kernel[(len(padded) // 1024,)](padded, *out, BLOCK=1024)
    return [t[: len(x)].cpu() for t in out]


def neighbours(values):
    """Each f32 value with the floats next to it, and all their negatives."""
    inf = torch.tensor(math.inf)
    values = torch.cat([values, values.nextafter(inf), values.nextafter(-inf)])
    return torch.cat([values, -values])


def test_bf16_rounding_equals_torchs_at_every_kind_of_value():
    upper = torch.arange(0, 1 << 16, 3, dtype=torch.int32) << 16
    x = torch.cat([(upper | low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    got, wanted = rounded(x)[0], x.bfloat16()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[~x.isnan()].view(torch.int16), wanted[~x.isnan()].view(torch.int16))


def test_e4m3_rounding_is_to_nearest_even_and_saturates():
    finite = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (finite[1:] + finite[:-1]) / 2
    random = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    x = neighbours(torch.cat([finite, ties, random, torch.tensor([449.0, 464.0, 465.0, 1e30, math.inf])]))
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(rounded(x)[1], wanted)
    assert rounded(torch.tensor([math.nan, 500.0, -500.0]))[1].tolist() == [0x7F, 0x7E, 0xFE]


def test_e2m1_codes_equal_the_formats():
    values = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, math.inf, math.nan])
    x = neighbours(values)
    assert torch.equal(rounded(x)[2], nvfp4.e2m1_encode(x))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rounded(ties)[2].tolist() == [0, 2, 2, 4, 4, 6, 6]


def test_e4m3_and_e2m1_codes_decode_to_the_formats_values():
    codes = torch.arange(256, dtype=torch.uint8)
    e4m3, e2m1 = torch.empty(2, 256, device=DEVICE)
    _decode_kernel[(1,)](codes.to(DEVICE), e4m3, e2m1, BLOCK=256)
    torch.testing.assert_close(e4m3.cpu(), codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(e2m1.cpu(), nvfp4.e2m1_decode(codes & 15))


def test_every_triton_kernel_compiles_for_every_gpu_generation():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "step_kernels.triton.build"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    built = [line for line in run.stdout.splitlines() if line.startswith("swiglu")]
    assert len(built) == 12 * 6  # three types, with and without limit, two tiles, for sm_80, 89, 90, 100, 103 and 120
    assert all(" bytes, " in line for line in built)


@pytest.mark.gpu
def test_registry_serves_half_floats_by_triton_and_float64_by_the_reference():
    x = random_rows(4, 64)
    assert registry.table("swiglu", x.half(), 7.0).splitlines()[2].split() == ["triton", "serves"]
    table = registry.table("swiglu", x.double(), 7.0).splitlines()
    assert "got float64" in table[2] and table[3].split() == ["reference", "serves"]
    assert torch.equal(sk.swiglu(x.double(), 7.0), sk.swiglu.reference(x.double(), 7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, n", [(1, 1280), (1025, 1280), (65, 11264)])
def test_op_on_the_gpu_errs_no_more_than_torch_and_repeats_its_bits(tokens, n):
    x = random_rows(tokens, 2 * n)
    with sk.force("triton"):
        assert_close_to_reference(sk.swiglu, sk.swiglu.reference, x, 7.0)
        first = sk.swiglu(x, 7.0)
        assert all(torch.equal(sk.swiglu(x, 7.0), first) for _ in range(5))


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_kernel_on_new_input():
    x = random_rows(64, 2560)
    with sk.force("triton"):
        sk.swiglu(x, 7.0)  # compiles it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sk.swiglu(x, 7.0)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(out, sk.swiglu(x, 7.0))
