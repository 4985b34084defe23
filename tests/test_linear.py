"""linear, in FP8 too, and SwiGLU of both: hand-worked and looped products, types, shapes, compile, opcheck, errors."""

from __future__ import annotations

import re

import pytest
import torch

import step_kernels as sk
from step_kernels.testing import relative_error

OP = torch.ops.step_kernels.linear.default
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_a_hand_worked_product_in_every_type():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.tensor([[1, 2, 3], [0, -1, 4]], dtype=dtype)
        weight = torch.tensor([[1, 0, 2], [-1, 0.5, 0]], dtype=dtype)
        out = sk.linear(x, weight)
        assert out.dtype == dtype and out.tolist() == [[7, 0], [8, -0.5]]


def test_products_equal_a_loop_over_rows_and_columns():
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    rows = x.reshape(6, 5).tolist()
    wanted = [[sum(a * b for a, b in zip(row, column)) for column in weight.tolist()] for row in rows]
    assert torch.allclose(sk.linear(x, weight), torch.tensor(wanted, dtype=torch.float64).view(2, 3, 4), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_output_keeps_the_bits_that_narrow_output_rounds_away(dtype):
    x, weight = torch.randn(5, 256).to(dtype), torch.randn(7, 256).to(dtype)
    wanted = x.double() @ weight.double().mT
    wide = sk.linear(x, weight, torch.float32)
    assert wide.dtype == torch.float32 and relative_error(wide, wanted) < 1e-6
    assert torch.equal(sk.linear(x, weight, dtype), sk.linear(x, weight))
    assert relative_error(sk.linear(x, weight), wanted) > 1e-4
    assert torch.equal(sk.linear(x.float(), weight.float(), dtype), wide.to(dtype))


def test_no_tokens_no_rows_and_no_columns():
    x, weight = torch.randn(2, 0, 8), torch.randn(4, 8)
    assert sk.linear(x, weight).shape == (2, 0, 4)
    assert sk.linear(torch.randn(3, 8), weight[:0]).shape == (3, 0)
    assert sk.linear(torch.randn(3, 0), weight[:, :0]).tolist() == [[0] * 4] * 3


@pytest.mark.parametrize(
    "x, weight, out_dtype, error, message",
    [
        ((2, 8), (4, 6), None, ValueError, "x: got shape [2, 8], wanted [..., 6]"),
        ((2, 8), (8,), None, ValueError, "weight: got shape [8], wanted [any, any]"),
        ((2, 8), (4, 8), torch.int32, TypeError, "out_dtype: got torch.int32, wanted a floating-point type"),
    ],
)
def test_errors_name_the_argument_what_came_and_what_was_wanted(x, weight, out_dtype, error, message):
    with pytest.raises(error, match=re.escape(message)):
        sk.linear(torch.zeros(x), torch.zeros(weight), out_dtype)


def test_x_and_weight_must_be_of_one_type():
    with pytest.raises(TypeError, match="x: got float32, wanted bfloat16"):
        sk.linear(torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.bfloat16))


def test_op_keeps_the_rules_of_torch_library_and_compiles_whole():
    for out_dtype in (None, torch.float32):
        arguments = (torch.randn(2, 3, 16).bfloat16(), torch.randn(4, 16).bfloat16(), out_dtype)
        torch.library.opcheck(OP, arguments)
        compiled = torch.compile(lambda x, w, out_dtype=out_dtype: sk.linear(x, w, out_dtype) + 1, fullgraph=True)
        assert torch.equal(compiled(*arguments[:2]), sk.linear(*arguments) + 1)


def test_fp8_products_are_those_of_codes_times_their_rows_scale():
    codes = torch.tensor([[1, -2, 0.5], [448, 0, -0.001953125]]).to(torch.float8_e4m3fn)
    x, scale = torch.tensor([[1, 2, 4], [0.5, 0, -1]]), torch.tensor([2.0, 0.25])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        out = sk.fp8_linear(x.to(dtype), codes, scale)
        wanted = [[-2, 111.998046875], [0, 56.00048828125]]
        assert out.dtype == dtype and out.tolist() == torch.tensor(wanted, dtype=torch.float64).to(dtype).tolist()
    wide = sk.fp8_linear(x.bfloat16(), codes, scale, torch.float32)
    assert wide.dtype == torch.float32 and wide.tolist() == wanted


def test_fp8_sums_are_rounded_once():
    codes, scale = torch.randn(7, 256).to(torch.float8_e4m3fn), torch.rand(7)
    x = torch.randn(2, 3, 256).bfloat16()
    wanted = (x.double() @ codes.double().mT) * scale.double()
    assert relative_error(sk.fp8_linear(x.double(), codes, scale), wanted) < 1e-14
    wide = sk.fp8_linear(x, codes, scale, torch.float32)
    assert relative_error(wide, wanted) < 1e-6 and torch.equal(sk.fp8_linear(x, codes, scale), wide.bfloat16())


def test_fp8_errors_name_the_argument():
    codes, x = torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=re.escape("scale: got shape [3], wanted [4]")):
        sk.fp8_linear(x, codes, torch.ones(3))
    with pytest.raises(TypeError, match="codes: got float32, wanted float8_e4m3fn"):
        sk.fp8_linear(x, codes.float(), torch.ones(4))
    with pytest.raises(ValueError, match=re.escape("x: got shape [2, 6], wanted [..., 8]")):
        sk.fp8_linear(x[:, :6], codes, torch.ones(4))


def test_fp8_op_keeps_the_rules_of_torch_library_and_compiles_whole():
    arguments = (torch.randn(2, 16).bfloat16(), torch.randn(4, 16).to(torch.float8_e4m3fn), torch.rand(4))
    torch.library.opcheck(torch.ops.step_kernels.fp8_linear.default, arguments, test_utils=NO_SCHEMA_TEST)
    compiled = torch.compile(lambda *a: sk.fp8_linear(*a) + 1, fullgraph=True)
    assert torch.equal(compiled(*arguments), sk.fp8_linear(*arguments) + 1)


def test_swiglu_of_a_hand_worked_product_takes_gate_from_the_first_half_of_the_rows():
    x, weight = torch.tensor([[0.0, 1], [1, -2]]), torch.tensor([[1.0, 0], [0, 30], [2, 0], [0, -1]])
    codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor([1, 0.5, 2, 1])
    # gates 0, 30 and 1, -60, ups 0, -1 and 2, 2; in FP8 gates 0, 15 and 1, -30, ups 0, -1 and 4, 2; silu(1) is 0.731059
    for out, wanted in (
        (sk.linear_swiglu(x, weight), [[0, -30], [1.462117, 0]]),
        (sk.linear_swiglu(x, weight, 0.5), [[0, -0.25], [0.25, 0]]),
        (sk.fp8_linear_swiglu(x, codes, scale), [[0, -15], [2.924234, 0]]),
        (sk.fp8_linear_swiglu(x, codes, scale, 0.9), [[0, -0.81], [0.731059 * 0.9, 0]]),
    ):
        assert torch.allclose(out, torch.tensor(wanted), atol=1e-5)


def test_swiglu_is_of_the_product_as_linear_rounds_it():
    weight, x = torch.randn(14, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    codes, scale = weight.to(torch.float8_e4m3fn), torch.rand(14)
    for limit in (None, 1.5):
        assert torch.equal(sk.linear_swiglu(x, weight, limit), sk.swiglu(sk.linear(x, weight), limit))
        both = sk.swiglu(sk.fp8_linear(x, codes, scale), limit)
        assert torch.equal(sk.fp8_linear_swiglu(x, codes, scale, limit), both)
    wide = sk.swiglu(sk.linear(x, weight, torch.float32), 1.5).bfloat16()
    assert not torch.equal(sk.linear_swiglu(x, weight, 1.5), wide)
    assert sk.linear_swiglu(x[:, :0], weight).shape == (2, 0, 7)


def test_swiglu_errors_name_the_argument():
    x, weight = torch.zeros(2, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match="weight: got 5 rows, wanted as many of gate as of up"):
        sk.linear_swiglu(x, weight)
    with pytest.raises(ValueError, match="codes: got 5 rows, wanted as many of gate as of up"):
        sk.fp8_linear_swiglu(x, weight.to(torch.float8_e4m3fn), torch.ones(5))
    with pytest.raises(ValueError, match="limit: got -1.0, wanted a positive number"):
        sk.linear_swiglu(x, weight[:4], -1.0)
    with pytest.raises(ValueError, match=re.escape("x: got shape [2, 6], wanted [..., 8]")):
        sk.linear_swiglu(x[:, :6], weight[:4])


def test_swiglu_ops_keep_the_rules_of_torch_library_and_compile_whole():
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    torch.library.opcheck(torch.ops.step_kernels.linear_swiglu.default, (x, weight, 1.0))
    fp8 = (x, weight.to(torch.float8_e4m3fn), torch.rand(4), 1.0)
    torch.library.opcheck(torch.ops.step_kernels.fp8_linear_swiglu.default, fp8, test_utils=NO_SCHEMA_TEST)
    compiled = torch.compile(lambda *a: sk.linear_swiglu(a[0], weight, 1.0) + sk.fp8_linear_swiglu(*a), fullgraph=True)
    assert torch.equal(compiled(*fp8), sk.linear_swiglu(x, weight, 1.0) + sk.fp8_linear_swiglu(*fp8))
