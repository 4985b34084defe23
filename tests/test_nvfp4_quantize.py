"""The nvfp4_quantize and nvfp4_dequantize ops: hand-worked blocks, views, compile, opcheck, errors."""

from __future__ import annotations

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4

OPS = torch.ops.step_kernels
ONE = torch.tensor(1.0)
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_a_hand_worked_block_quantizes_to_these_bytes():
    # amax 12 -> scale 2; over 2: 6 -> 7, -1.25 -> -1 (tie, even), 1.75 -> 2 (tie, even), -0.2 -> -0, 5 -> 4 (tie)
    x = torch.tensor([[12, -2.5, 3.5, -0.4, 10] + [0.0] * 11])
    codes, scales = sk.nvfp4_quantize(x, ONE)
    assert codes.tolist() == [[0xA7, 0x84, 0x06, 0, 0, 0, 0, 0]] and scales.float().tolist() == [[2]]
    values = sk.nvfp4_dequantize(codes, scales, torch.tensor(0.5), torch.float32)
    assert values[0, :5].tolist() == [6, -1, 2, 0, 4] and not values[0, 5:].any()


def test_block_scales_round_to_e4m3_and_codes_use_the_rounded_scale():
    x = torch.full((16,), 6.9)  # 6.9 / 6 = 1.15 -> e4m3 1.125; 6.9 / 1.125 = 6.13 -> code 7
    codes, scales = sk.nvfp4_quantize(x, ONE)
    assert scales.float().tolist() == [1.125] and codes.tolist() == [0x77] * 8
    assert sk.nvfp4_dequantize(codes, scales, ONE).tolist() == [6.75] * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_type_gives_the_codes_of_its_f32_values(dtype):
    x = torch.randn(3, 5, 32).to(dtype)
    scale = torch.tensor(0.01)
    codes, scales = sk.nvfp4_quantize(x, scale)
    wanted_codes, wanted_scales = sk.nvfp4_quantize(x.float(), scale)
    assert codes.shape == (3, 5, 16) and scales.shape == (3, 5, 2)
    assert torch.equal(codes, wanted_codes) and torch.equal(scales.float(), wanted_scales.float())
    assert sk.nvfp4_dequantize(codes, scales, scale, dtype).dtype == dtype


def test_dequantize_rounds_the_f32_product_once():
    # 3 * (1.125 * g): in f32, then to bf16; rounding the scale to bf16 first would give another value for some g
    scales = torch.full((1,), 1.125).to(torch.float8_e4m3fn)
    codes = torch.full((8,), 0x55, dtype=torch.uint8)
    for g in torch.rand(50):
        wanted = (torch.tensor(3.0) * (torch.tensor(1.125) * g)).bfloat16()
        assert sk.nvfp4_dequantize(codes, scales, g)[0] == wanted


def test_views_quantize_like_their_copies_into_contiguous_outputs():
    x = torch.randn(64, 6)
    for view in (x.T, torch.randn(5, 2, 32).transpose(0, 1), torch.randn(4, 96)[::2, 32:64]):
        got, wanted = sk.nvfp4_quantize(view, ONE), sk.nvfp4_quantize(view.contiguous(), ONE)
        assert all(g.is_contiguous() for g in got)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1].float(), wanted[1].float())
        codes, scales = (t.mT.contiguous().mT for t in wanted)
        values = sk.nvfp4_dequantize(codes, scales, ONE)
        assert values.is_contiguous() and torch.equal(values, sk.nvfp4_dequantize(*wanted, ONE))


def test_no_rows_and_no_columns_give_empty_outputs():
    for shape in ((0, 32), (3, 0)):
        codes, scales = sk.nvfp4_quantize(torch.zeros(shape), ONE)
        assert codes.shape == (shape[0], shape[1] // 2) and scales.shape == (shape[0], shape[1] // 16)
        assert sk.nvfp4_dequantize(codes, scales, ONE).shape == shape


def test_a_nan_marks_its_own_block_alone():
    x = torch.ones(64)
    x[20] = torch.nan
    values = sk.nvfp4_dequantize(*sk.nvfp4_quantize(x, ONE), ONE)
    assert values.isnan().tolist() == [False] * 16 + [True] * 16 + [False] * 32


def test_opcheck_passes():
    codes, scales = sk.nvfp4_quantize(torch.randn(6, 64), ONE)
    for x in (torch.randn(6, 64), torch.randn(64, 6).T, torch.randn(2, 3, 16).bfloat16()):
        torch.library.opcheck(OPS.nvfp4_quantize.default, (x, ONE))
    for c, s in ((codes, scales), (codes.mT.contiguous().mT, scales[:, ::1])):
        torch.library.opcheck(OPS.nvfp4_dequantize.default, (c, s, ONE, torch.float16), test_utils=NO_SCHEMA_TEST)


def test_compiled_calls_equal_eager_ones():
    def both(x, scale):
        return sk.nvfp4_dequantize(*sk.nvfp4_quantize(x * 2, scale), scale)

    x = torch.randn(4, 32)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x, ONE), both(x, ONE))


U8, F8 = torch.uint8, torch.float8_e4m3fn
BAD = [
    ("x: got int32, wanted bfloat16 or", TypeError, sk.nvfp4_quantize, torch.zeros(16, dtype=torch.int32), ONE),
    ("x: got last dimension 24, wanted a multiple of 16", ValueError, sk.nvfp4_quantize, torch.zeros(24), ONE),
    (r"global_scale: got shape \[1\], wanted \[\]", ValueError, sk.nvfp4_quantize, torch.zeros(16), ONE[None]),
    ("global_scale: got float64, wanted float32", TypeError, sk.nvfp4_quantize, torch.zeros(16), ONE.double()),
    ("different devices.*meta", ValueError, sk.nvfp4_quantize, torch.zeros(16, device="meta"), ONE),
    ("codes: got int8", TypeError, sk.nvfp4_dequantize, torch.zeros(8).char(), torch.zeros(1).to(F8), ONE),
    ("codes: got last dimension 12, wanted a multiple of 8", ValueError, sk.nvfp4_dequantize,
     torch.zeros(12, dtype=U8), torch.zeros(1).to(F8), ONE),
    (r"scales: got shape \[3\], wanted \[2\]", ValueError, sk.nvfp4_dequantize,
     torch.zeros(16, dtype=U8), torch.zeros(3).to(F8), ONE),
    ("scales: got uint8, wanted float8_e4m3fn", TypeError, sk.nvfp4_dequantize,
     torch.zeros(16, dtype=U8), torch.zeros(2, dtype=U8), ONE),
    ("dtype: got int32, wanted", TypeError, sk.nvfp4_dequantize,
     torch.zeros(16, dtype=U8), torch.zeros(2).to(F8), ONE, torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, op, *args = case
    with pytest.raises(kind, match=message):
        op(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_gpu_chooses_the_scales_and_codes_that_the_cpu_chooses(search):
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    outer = nvfp4.global_scale(x.abs().amax(), search)
    scales = nvfp4.search_scales(x, outer, search)
    assert torch.equal(nvfp4.global_scale(x.cuda().abs().amax(), search).cpu(), outer)
    on_gpu = nvfp4.search_scales(x.cuda(), outer.cuda(), search)
    assert torch.equal(on_gpu.view(torch.uint8).cpu(), scales.view(torch.uint8))
    codes, _ = nvfp4.quantize(x.cuda(), outer.cuda(), on_gpu)
    assert torch.equal(codes.cpu(), nvfp4.quantize(x, outer, scales)[0])
