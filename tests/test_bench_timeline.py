"""bench.timeline: which kernels count as big, and the time that they leave uncovered."""

from __future__ import annotations

import pytest

from bench.timeline import between, is_big


@pytest.mark.parametrize(
    "kernel",
    ["sm90_linear_t8_12", "sm90_fp8_linear_t4", "sm90_nvfp4_linear_t2", "sm90_nvfp4_moe_gate_up_few",
     "sm90_nvfp4_moe_down_t8", "sm90_paged_attention_e4m3_8", "nvjet_sm90_tst_64x8_64x16", "_gate_up_kernel"],
)  # fmt: skip
def test_linears_experts_and_full_attention_are_big(kernel):
    assert is_big(kernel)


@pytest.mark.parametrize(
    "kernel",
    ["smxx_rms_norm_bf16_3_1", "smxx_kv_append_e4m3_4_1", "sm90_paged_attention_window_16_8",
     "sm90_paged_attention_window_rows_8_2", "smxx_swiglu",
     "smxx_moe_router_one_i9", "sm90_fp8_linear_split", "sm90_nvfp4_moe_sum", "Memcpy DtoH (Device -> Pinned)"],
)  # fmt: skip
def test_what_lies_between_them_is_not(kernel):
    assert not is_big(kernel)


def test_gaps_between_big_kernels_count_whatever_fills_them():
    step = [("smxx_rms_norm", 10.0, 12.0), ("sm90_linear", 12.0, 20.0), ("smxx_swiglu", 20.0, 21.0),
            ("sm90_linear", 25.0, 28.0), ("smxx_choose", 28.0, 30.0)]  # fmt: skip
    assert between(step) == pytest.approx((2 + 5 + 2) / 20)
    assert between(step[::-1]) == pytest.approx((2 + 5 + 2) / 20)


def test_kernels_that_run_beside_each_other_count_once():
    step = [("smxx_rms_norm", 0.0, 3.0), ("a_linear", 2.0, 10.0), ("b_linear", 3.0, 4.0), ("smxx_swiglu", 4.0, 6.0),
            ("c_linear", 9.0, 12.0), ("smxx_choose", 11.0, 16.0)]  # fmt: skip
    assert between(step) == pytest.approx((2 + 4) / 16)


def test_a_step_without_big_kernels_is_all_between_them():
    assert between([("smxx_swiglu", 5.0, 6.0), ("smxx_choose", 8.0, 9.0)]) == 1.0
