"""nvfp4_linear: hand-worked and looped products, split scales, views, compile, opcheck, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import step_kernels as sk
from step_kernels.testing import nvfp4_weight, relative_error

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
