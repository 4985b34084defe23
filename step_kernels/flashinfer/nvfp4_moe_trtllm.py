"""Routed experts by FlashInfer's trtllm-gen kernels (sm_100, sm_103): W4A4, with Step's clamp after silu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import w4a4
from . import refuse as refuse_version
from .layout import Prepared, interleave_gate_up, shuffle_rows, swizzle_scales
from .nvfp4_moe import inner_scale, scales_are_shared


def refuse(
    x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global_scale, down_codes, down_scales, down_global_scale,
    limit=None,
) -> str | None:  # fmt: skip
    """bf16, at least one token, whole tiles; with a limit one global scale for gate and up; W4A4 allowed."""
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    hidden, inner = down_codes.shape[1], down_codes.shape[2] * 2
    if hidden % 128 or inner % 128 or not hidden or not inner:
        return f"takes hidden and inner in multiples of 128, got {hidden} and {inner}"
    if not x.shape[0]:
        return "takes at least one token"
    if gate_up_codes.shape[0] % 4 or ids.shape[1] > 32:
        return f"takes experts in multiples of 4 and up to 32 a token, got {gate_up_codes.shape[0]} and {ids.shape[1]}"
    reason = refuse_version() or w4a4.refuse()
    if reason is None and limit is not None and not scales_are_shared(gate_up_global_scale):
        return "clamps gate and up in one unit, their global scales differ"
    return reason


def _build(gate_up_codes: Tensor, gate_up_scales: Tensor, down_codes: Tensor, down_scales: Tensor) -> tuple:
    """Shuffled codes, a second copy of them all, and scales [experts, rows, k / 16] in the swizzled order."""
    gate_up_raw, down_raw = gate_up_scales.view(torch.uint8), down_scales.view(torch.uint8)
    return (
        shuffle_rows(interleave_gate_up(gate_up_codes)),
        swizzle_scales(shuffle_rows(interleave_gate_up(gate_up_raw))).view(torch.float8_e4m3fn),
        shuffle_rows(down_codes),
        swizzle_scales(shuffle_rows(down_raw)).view(torch.float8_e4m3fn),
    )


_prepared = Prepared(_build)


def launch(
    x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global_scale, down_codes, down_scales, down_global_scale,
    limit=None,
) -> Tensor:  # fmt: skip
    """nvfp4_moe's flat arguments -> bf16 [tokens, hidden]; ids outside the local experts are skipped."""
    import flashinfer

    experts, inner_size = gate_up_codes.shape[0], down_codes.shape[2] * 2
    gate_up, gate_up_swizzled, down, down_swizzled = _prepared(gate_up_codes, gate_up_scales, down_codes, down_scales)
    gate_global, up_global = gate_up_global_scale.reshape(experts, -1).expand(experts, 2).unbind(1)
    outer, inner = w4a4.activation_scale(x), inner_scale(limit, x.device)
    linear = flashinfer.SfLayout.layout_linear
    codes, scales = flashinfer.nvfp4_quantize(
        x.contiguous(), outer.reciprocal().view(1), sfLayout=linear, nvfp4_4over6=None
    )
    kinds, gate_scale = flashinfer.ActivationType, outer * gate_global
    outside = (ids < 0) | (ids >= experts)  # these count for expert 0 with weight 0
    routing = ids.masked_fill(outside, 0), weights.masked_fill(outside, 0.0)
    return flashinfer.trtllm_fp4_block_scale_routed_moe(
        topk_ids=routing,
        routing_bias=None,
        hidden_states=codes,
        hidden_states_scale=scales.view(torch.float8_e4m3fn).view(len(x), -1),
        gemm1_weights=gate_up,
        gemm1_weights_scale=gate_up_swizzled,
        gemm1_bias=None,
        gemm1_alpha=None,
        gemm1_beta=None,
        gemm1_clamp_limit=None if limit is None else limit / gate_scale,  # in the accumulator's unit
        gemm2_weights=down,
        gemm2_weights_scale=down_swizzled,
        gemm2_bias=None,
        output1_scale_scalar=outer * up_global / inner,  # of up, and into the inner activations' NVFP4
        output1_scale_gate_scalar=gate_scale,
        output2_scale_scalar=inner * down_global_scale,
        num_experts=experts,
        top_k=ids.shape[1],
        n_group=None,
        topk_group=None,
        intermediate_size=inner_size,
        local_expert_offset=0,
        local_num_experts=experts,
        routed_scaling_factor=None,
        routing_method_type=1,  # FlashInfer's callers with routing of their own name this one
        activation_type=int(kinds.Swiglu if limit is None else kinds.SwigluStep),
        hidden_states_scale_layout=linear,
    )[0]
