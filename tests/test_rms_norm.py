"""rms_norm and add_rms_norm: the references against hand-worked numbers, the Triton kernels against them."""

from __future__ import annotations

import math

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.testing import assert_close_to_reference, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the Triton kernel runs in the interpreter on the CPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.step_kernels
EPS = 1e-5


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * 2).to(device, dtype)


def test_x_is_divided_by_its_root_mean_square_and_multiplied_by_one_plus_the_weight():
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]]).double()
    out = sk.rms_norm(x, torch.tensor([0.0, 1.0]), 0.0)
    root = math.sqrt(12.5)
    assert out.flatten().tolist() == pytest.approx([3 / root, 8 / root, 0, -4 / math.sqrt(2)], rel=1e-12)


def test_eps_is_added_to_the_mean_square():
    out = sk.rms_norm(torch.tensor([3.0, 4.0]).double(), torch.zeros(2), 3.5)
    assert out.tolist() == pytest.approx([0.75, 1.0], rel=1e-12)  # 12.5 + 3.5 = 4^2
    assert sk.rms_norm(torch.zeros(2, 4), torch.ones(4), EPS).tolist() == [[0.0] * 4] * 2


def test_half_types_are_computed_in_f32_and_rounded_once():
    x, weight = random(3, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16)
    assert torch.equal(sk.rms_norm(x, weight, EPS), sk.rms_norm(x.float(), weight.float(), EPS).bfloat16())


def test_rms_norm_equals_torchs_with_weight_one_plus_w():
    x, weight = random(2, 3, 64), random(64)
    wanted = torch.nn.functional.rms_norm(x, (64,), 1 + weight, EPS)
    torch.testing.assert_close(sk.rms_norm(x, weight, EPS), wanted)


def test_the_sum_is_rounded_to_the_inputs_type_before_it_is_normed():
    x, residual = torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([1.0, 0.0]).bfloat16()
    out, total = sk.add_rms_norm(x, residual, torch.zeros(2), 0.0)
    assert total.tolist() == [256.0, 1.0]  # 257 is a tie in bf16's 8 bits: to the even one
    assert torch.equal(out, sk.rms_norm(total, torch.zeros(2), 0.0))
    x, residual, weight = random(5, 96, seed=1), random(5, 96, seed=2), random(96)
    out, total = sk.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual) and torch.equal(out, sk.rms_norm(x + residual, weight, EPS))


def test_three_terms_are_added_in_f32_and_rounded_once():
    x, residual, other = torch.tensor([[256.0, 1.0]] + [[1.0, 0.0]] * 2).bfloat16()
    total = sk.add_rms_norm(x, residual, torch.zeros(2), 0.0, other)[1]
    assert total.tolist() == [258.0, 1.0]  # 256 + 1 is 256 in bf16, twice
    x, residual, other = (random(5, 96, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    out, total = sk.add_rms_norm(x, residual, torch.zeros(96), EPS, other)
    assert torch.equal(total, ((x.float() + residual.float()) + other.float()).bfloat16())
    assert torch.equal(out, sk.rms_norm(total, torch.zeros(96), EPS))
    double = torch.tensor([1.0]).double(), torch.tensor([2.0**-40]).double(), torch.zeros(1), 0.0
    assert sk.add_rms_norm(*double, double[1])[1].item() == 1 + 2.0**-39


def test_ops_keep_the_rules_of_torch_library():
    for x in (random(3, 10), torch.empty(0, 8), random(2, 6, 8)[:, ::2], random(4, 6).t(), random(7)):
        weight = random(x.shape[-1])
        torch.library.opcheck(OPS.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(OPS.add_rms_norm.default, (x, x.flip(0), weight, EPS))
        torch.library.opcheck(OPS.add_rms_norm.default, (x, x.flip(0), weight, EPS, x + 1))


def test_torch_compile_takes_the_ops_without_a_graph_break():
    x, weight = random(3, 10), random(10)

    def both(x):
        out, total = sk.add_rms_norm(x, x * 2, weight, EPS)
        return sk.rms_norm(out, weight, EPS) + total

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


BAD = [
    ("x: got int32, wanted bfloat16 or", TypeError, sk.rms_norm, torch.zeros(2, 4).int(), torch.zeros(4)),
    (r"x: got shape \[\], wanted \[..., any\]", ValueError, sk.rms_norm, torch.tensor(1.0), torch.zeros(1)),
    (r"weight: got shape \[5\], wanted \[4\]", ValueError, sk.rms_norm, torch.zeros(2, 4), torch.zeros(5)),
    (r"residual: got shape \[4\], wanted \[2, 4\]", ValueError, sk.add_rms_norm,
     torch.zeros(2, 4), torch.zeros(4), torch.zeros(4)),
    ("residual: got bfloat16, wanted float32", TypeError, sk.add_rms_norm,
     torch.zeros(4), torch.zeros(4).bfloat16(), torch.zeros(4)),
    ("different devices.*meta", ValueError, sk.rms_norm, torch.zeros(2, 4), torch.zeros(4, device="meta")),
]  # fmt: skip


def test_a_third_term_of_another_shape_or_type_is_named():
    x, weight = torch.zeros(2, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"other: got shape \[4\], wanted \[2, 4\]"):
        sk.add_rms_norm(x, x, weight, EPS, weight)
    with pytest.raises(TypeError, match="other: got bfloat16, wanted float32"):
        sk.add_rms_norm(x, x, weight, EPS, x.bfloat16())


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, op, *args = case
    with pytest.raises(kind, match=message):
        op(*args, EPS)


def test_triton_refuses_float64_and_rows_of_more_than_65536():
    pytest.importorskip("triton")
    weight = torch.zeros(4)

    def table(op, *args):
        return registry.table(op, *args, EPS, capability=80)

    assert "triton       serves" in table("rms_norm", torch.zeros(2, 4).half(), weight)
    refused = "takes bfloat16, float16 and float32, got x in float64"
    assert refused in table("rms_norm", torch.zeros(2, 4).double(), weight)
    assert refused in table("add_rms_norm", *torch.zeros(2, 2, 4).double(), weight)
    assert "got weight in float64" in table("rms_norm", torch.zeros(2, 4), weight.double())
    wide = table("rms_norm", torch.zeros(1, 65537), torch.zeros(65537))
    assert "takes rows of at most 65536, got 65537" in wide and "reference    serves" in wide


# The Triton kernel, on the GPU or in the interpreter.


def launch(*args):
    pytest.importorskip("triton")
    from step_kernels.triton.rms_norm import launch

    return launch(*args)


def launch_add(*args):
    pytest.importorskip("triton")
    from step_kernels.triton.rms_norm import launch_add

    return launch_add(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 37), (2, 5, 128), (3, 4096), (5000,)])
def test_triton_kernel_errs_no_more_than_torch_does(shape, dtype):
    x, residual = random(*shape, dtype=dtype, device=DEVICE), random(*shape, dtype=dtype, device=DEVICE, seed=1)
    weight = random(shape[-1], dtype=dtype, device=DEVICE) * 0.2
    assert_close_to_reference(launch, sk.rms_norm.reference, x, weight, EPS)
    for terms in ((), (x.flip(-1),)):
        out, total = launch_add(x, residual, weight, EPS, *terms)
        assert torch.equal(total, sk.add_rms_norm.reference(x, residual, weight, EPS, *terms)[1])
        assert torch.equal(out, launch(total, weight, EPS))


@pytest.mark.parametrize("weight_type", DTYPES)
def test_triton_kernel_takes_a_weight_of_any_type(weight_type):
    x, weight = random(4, 96, dtype=torch.bfloat16, device=DEVICE), random(96, dtype=weight_type, device=DEVICE)
    assert_close_to_reference(lambda x: launch(x, weight, EPS), lambda x: sk.rms_norm.reference(x, weight, EPS), x)


def test_triton_kernel_reads_any_strides():
    x = random(6, 4, 80, device=DEVICE)
    for view in (x[:, :, :74], x[::2], x[..., ::2], x.transpose(0, 1), x[:, 1], x[:, :1].expand(6, 3, 80)):
        weight = random(2 * view.shape[-1], device=DEVICE)[::2]
        out = launch(view, weight, EPS)
        assert out.is_contiguous() and relative_error(out, sk.rms_norm.reference(view, weight, EPS)) < 2e-7
        out, total = launch_add(view, view.flip(0), weight, EPS, view)
        wanted, wanted_total = sk.add_rms_norm.reference(view, view.flip(0), weight, EPS, view)
        assert out.is_contiguous() and total.is_contiguous() and torch.equal(total, wanted_total)
        assert relative_error(out, wanted) < 2e-7


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_triton_kernel_keeps_nan_and_infinity_to_their_rows():
    x = torch.ones(16, 32, device=DEVICE)
    x[3, 7], x[9, 0], x[12] = math.nan, math.inf, 0
    out, wanted = launch(x, x[0], EPS), sk.rms_norm.reference(x, x[0], EPS)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    assert out.isnan().sum(1).tolist() == [32 if i == 3 else 1 if i == 9 else 0 for i in range(16)]


def test_triton_kernel_of_no_elements_is_empty():
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        x, weight = torch.empty(shape, device=DEVICE), torch.empty(shape[-1], device=DEVICE)
        assert launch(x, weight, EPS).shape == shape
        assert [t.shape for t in launch_add(x, x, weight, EPS)] == [shape] * 2


@pytest.mark.parametrize("n", [1, 37, 1500])
def test_triton_kernel_writes_its_outputs_and_nothing_beside_them(n):
    pytest.importorskip("triton")
    from step_kernels.triton.rms_norm import _rms_norm_kernel, tile

    x, weight = random(3, n, dtype=torch.bfloat16, device=DEVICE), random(n, device=DEVICE)
    out, total = torch.full((2, 5, n), -7.0, dtype=torch.bfloat16, device=DEVICE)
    block, together, warps = tile(n)
    constants = {"TERMS": 2, "ROWS": together, "BLOCK": block, "num_warps": warps}
    grid = (-(-3 // together),)
    _rms_norm_kernel[grid](x, x, x, weight, out[1:], total[1:], 3, n, n, n, n, EPS, **constants)
    wanted, wanted_total = sk.add_rms_norm.reference(x, x, weight, EPS)
    assert torch.equal(total[1:4], wanted_total)
    torch.testing.assert_close(out[1:4], wanted, rtol=0.01, atol=1e-6)  # a bf16 ulp
    assert all((t[0] == -7).all() and (t[4] == -7).all() for t in (out, total))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (1025, 4096), (513, 64, 128), (7, 65536)])
def test_ops_on_the_gpu_err_no_more_than_torch_and_repeat_their_bits(shape, dtype):
    x, residual = random(*shape, dtype=dtype, device="cuda"), random(*shape, dtype=dtype, device="cuda", seed=1)
    weight = random(shape[-1], dtype=dtype, device="cuda") * 0.2
    with sk.force("triton"):
        assert_close_to_reference(sk.rms_norm, sk.rms_norm.reference, x, weight, EPS)
        out, total = sk.add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, x + residual) and torch.equal(out, sk.rms_norm(total, weight, EPS))
        for _ in range(3):
            assert all(map(torch.equal, sk.add_rms_norm(x, residual, weight, EPS), (out, total)))


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_kernels_on_new_input():
    x, residual, weight = (random(*shape, device="cuda") for shape in ((64, 4096), (64, 4096), (4096,)))
    with sk.force("triton"):
        sk.add_rms_norm(x, residual, weight, EPS), sk.rms_norm(x, weight, EPS)  # compiles them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, total = sk.add_rms_norm(x, residual, weight, EPS)
            again = sk.rms_norm(total, weight, EPS)
        x.copy_(x.flip(0))
        graph.replay()
        wanted, wanted_total = sk.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(out, wanted) and torch.equal(total, wanted_total) and torch.equal(again, wanted)


@pytest.mark.gpu
def test_opcheck_passes_on_the_gpu():
    x, weight = random(3, 128, device="cuda"), random(128, device="cuda")
    with sk.force("triton"):
        torch.library.opcheck(OPS.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(OPS.add_rms_norm.default, (x, x.flip(0), weight, EPS))
