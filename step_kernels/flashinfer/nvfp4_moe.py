"""Routed experts by FlashInfer's CUTLASS kernels: W4A4, with Step's clamp after silu (SwigluStep)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nvfp4, w4a4
from . import refuse as refuse_version
from .layout import Prepared, swizzle_scales, up_first

# The activations between the two products take a fixed scale, as the op has no calibrated one. Two clamped factors
# stay below limit^2. Without a clamp it is 1, ModelOpt's data-free scale: nothing below 2688 saturates, and blocks
# whose amax is over 0.1 keep their precision.
INNER_AMAX = 2688.0


def _shared(gate_up_global_scale: Tensor) -> bool:
    scale = gate_up_global_scale
    return scale.dim() == 1 or bool((scale[:, 0] == scale[:, 1]).all())  # a sync, once a weight, before any graph


scales_are_shared = Prepared(_shared)


def refuse(
    x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global_scale, down_codes, down_scales, down_global_scale,
    limit=None,
) -> str | None:  # fmt: skip
    """bf16, at least one token, whole scale tiles, one global scale for gate and up, W4A4 allowed."""
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    hidden, inner = down_codes.shape[1], down_codes.shape[2] * 2
    if hidden % 128 or inner % 64 or not hidden or not inner:
        return f"takes hidden in multiples of 128 and inner of 64, got {hidden} and {inner}"
    if not x.shape[0]:
        return "takes at least one token"
    reason = refuse_version() or w4a4.refuse()
    if reason is None and not scales_are_shared(gate_up_global_scale):
        return "takes one global scale an expert for gate and up, these differ"
    return reason


def _build(gate_up_codes: Tensor, gate_up_scales: Tensor, down_codes: Tensor, down_scales: Tensor) -> tuple:
    """Codes as FlashInfer's packed i64, swizzled scales as its packed i32; the gate_up codes are a second copy."""
    return (
        up_first(gate_up_codes).view(torch.int64),
        swizzle_scales(up_first(gate_up_scales)).view(torch.int32),
        down_codes.contiguous().view(torch.int64),
        swizzle_scales(down_scales).view(torch.int32),
    )


_prepared = Prepared(_build)


def inner_scale(limit: float | None, device: torch.device) -> Tensor:
    """f32 []: the global scale of the activations between gate_up and down."""
    return nvfp4.global_scale(torch.full((), INNER_AMAX if limit is None else limit * limit, device=device))


def launch(
    x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global_scale, down_codes, down_scales, down_global_scale,
    limit=None,
) -> Tensor:  # fmt: skip
    """nvfp4_moe's flat arguments -> bf16 [tokens, hidden]; ids outside the local experts are skipped."""
    import flashinfer

    experts = gate_up_codes.shape[0]
    up_gate, up_gate_scales, down, swizzled_down = _prepared(gate_up_codes, gate_up_scales, down_codes, down_scales)
    gate_up_global = gate_up_global_scale.reshape(experts, -1)[:, 0]
    outer, inner = w4a4.activation_scale(x), inner_scale(limit, x.device)
    scales = [
        outer.reciprocal(), up_gate_scales, outer * gate_up_global,
        inner.reciprocal(), swizzled_down, inner * down_global_scale,
    ]  # fmt: skip
    kind = flashinfer.ActivationType.Swiglu if limit is None else flashinfer.ActivationType.SwigluStep
    limits = None if limit is None else torch.full((experts,), limit, dtype=torch.float32, device=x.device)
    # The fused finalize adds with atomics, in another order on every run.
    out = flashinfer.cutlass_fused_moe(
        x.contiguous(), ids.contiguous(), weights.contiguous(), up_gate, down, x.dtype, scales,
        swiglu_limit=limits, activation_type=kind, use_fused_finalize=False,
    )  # fmt: skip
    return out[0] if isinstance(out, (list, tuple)) else out
