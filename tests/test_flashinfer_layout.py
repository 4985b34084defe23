"""Scales and rows in the order of FlashInfer's kernels: documented formulas, its own helpers; made once a weight."""

from __future__ import annotations

import gc

import pytest
import torch
from flashinfer_stand_in import SOURCES, helpers, unswizzled

from step_kernels.flashinfer import layout, nvfp4_linear
from step_kernels.testing import nvfp4_weight

needs_flashinfer = pytest.mark.skipif(not SOURCES, reason="flashinfer is not installed")


def random_scales(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)


SHAPES = [(128, 4), (256, 12), (1, 1), (130, 5), (2560, 256)]


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_a_scale_lies_where_the_documented_offset_says(rows, columns):
    scales = random_scales(rows, columns)
    swizzled = layout.swizzle_scales(scales)
    assert swizzled.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4) and swizzled.dtype == scales.dtype
    assert torch.equal(unswizzled(swizzled, rows, columns).view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_unswizzling_inverts_and_padding_is_zero(rows, columns):
    scales = random_scales(3, rows, columns)
    swizzled = layout.swizzle_scales(scales)
    back = layout.unswizzle_scales(swizzled, rows, columns)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))
    assert swizzled.float().sum(dtype=torch.float64) == scales.float().sum(dtype=torch.float64)
    for expert in range(3):
        one = layout.swizzle_scales(scales[expert])
        assert torch.equal(swizzled[expert].view(torch.uint8), one.view(torch.uint8))


@needs_flashinfer
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_flashinfers_own_helper_reads_our_swizzled_scales(rows, columns):
    unswizzle = helpers("gemm/gemm_bf16_fp4.py", "_unswizzle_sf_128x4")["_unswizzle_sf_128x4"]
    scales = random_scales(rows, columns)
    back = unswizzle(layout.swizzle_scales(scales), rows, columns)
    assert torch.equal(back, scales.view(torch.uint8))


@needs_flashinfer
@pytest.mark.parametrize("rows", [128, 2560])
def test_flashinfers_own_helpers_shuffle_and_interleave_rows_as_ours_do(rows):
    utils = helpers(
        "utils.py", "srcToDstBlk16RowMap", "srcToDstBlk32RowMap", "get_shuffle_block_size",
        "get_shuffle_matrix_a_row_indices",
    )  # fmt: skip
    core = helpers("fused_moe/core.py", "get_reorder_rows_for_gated_act_gemm_row_indices")
    w = torch.arange(rows)[:, None].expand(rows, 2)
    shuffled = w[utils["get_shuffle_matrix_a_row_indices"](w, 128)]
    assert torch.equal(layout.shuffle_rows(w), shuffled)
    up_gate = layout.up_first(w)
    interleaved = up_gate[core["get_reorder_rows_for_gated_act_gemm_row_indices"](up_gate)]
    assert torch.equal(layout.interleave_gate_up(w), interleaved)


def test_rows_are_shuffled_in_blocks_of_32_and_interleaved_up_first():
    rows = torch.arange(64)[:, None]
    assert layout.shuffle_rows(rows)[32:42, 0].tolist() == [32, 36, 40, 44, 48, 52, 56, 60, 33, 37]
    assert layout.interleave_gate_up(torch.arange(6)[:, None])[:, 0].tolist() == [3, 0, 4, 1, 5, 2]


def test_preparation_runs_once_a_weight_and_again_after_a_write_and_forgets_freed_weights():
    built = []
    prepared = layout.Prepared(lambda tensor, factor: built.append(1) or tensor * factor)
    weight = torch.ones(4)
    assert prepared(weight, 3) is prepared(weight, 3) and len(built) == 1
    weight.mul_(2)
    assert torch.equal(prepared(weight, 3), torch.full((4,), 6.0)) and len(built) == 2
    del weight
    gc.collect()
    assert len(prepared._kept) == 0


def test_a_registered_op_hands_over_the_tensor_object_that_preparation_is_kept_under():
    seen = []
    with torch.library._scoped_library("step_kernels_test", "DEF") as library:
        library.define("identity(Tensor x) -> Tensor")
        library.impl("identity", lambda x: seen.append(id(x)) or x.clone(), "CPU")
        x = torch.ones(2)
        torch.ops.step_kernels_test.identity(x)
        torch.ops.step_kernels_test.identity(x)
    assert seen == [id(x)] * 2


def test_what_a_linear_layer_prepares_goes_with_its_weight():
    weight = nvfp4_weight(64, 64)
    nvfp4_linear._prepared_w4a4(weight.codes, weight.scales, weight.global_scale)
    assert len(nvfp4_linear._prepared_w4a4._kept) == 1
    del weight
    gc.collect()
    assert len(nvfp4_linear._prepared_w4a4._kept) == 0
