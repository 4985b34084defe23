"""The routed experts: sum over a token's experts of weight * down(swiglu(gate_up(x)))."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import prepared
from ..nvfp4 import BLOCK, NVFP4Experts, NVFP4Weight
from ..prepared import TILE
from ..registry import Kernel, define, expect, lazy
from .nvfp4_linear import in_checkpoint_layout, is_prepared
from .swiglu import FLOATS, swiglu


def _check(
    x, weights, ids, gate_up_codes, gate_up_scales, gate_up_global_scale, down_codes, down_scales, down_global_scale,
    limit=None,
):  # fmt: skip
    expect("x", x, (None, None), FLOATS)
    tokens, hidden = x.shape
    expect("weights", weights, (tokens, None), torch.float32)
    expect("ids", ids, tuple(weights.shape), torch.int32)
    if is_prepared(gate_up_scales):
        across = -(-hidden // TILE)
        expect("experts.gate_up.codes", gate_up_codes, (None, None, across, 2048), torch.uint8)
        expect("experts.gate_up.scales", gate_up_scales, (*gate_up_codes.shape[:3], 256), torch.uint8)
        count, pairs = gate_up_codes.shape[:2]
        expect("experts.down.codes", down_codes, (count, across, -(-pairs // 2), 2048), torch.uint8)
        expect("experts.down.scales", down_scales, (*down_codes.shape[:3], 256), torch.uint8)
    else:
        expect("experts.gate_up.codes", gate_up_codes, (None, None, hidden // 2), torch.uint8)
        count, double = gate_up_codes.shape[:2]
        if double % 2 or double // 2 % BLOCK:
            raise ValueError(f"experts.gate_up: got shape {[count, double, hidden]}, wanted [experts, 2 * inner, "
                             f"hidden], inner and hidden multiples of {BLOCK}")  # fmt: skip
        expect("experts.gate_up.scales", gate_up_scales, (count, double, hidden // BLOCK), torch.float8_e4m3fn)
        expect("experts.down.codes", down_codes, (count, hidden, double // 4), torch.uint8)
        expect("experts.down.scales", down_scales, (count, hidden, double // 2 // BLOCK), torch.float8_e4m3fn)
    if hidden % BLOCK:
        raise ValueError(f"x: got hidden size {hidden}, wanted a multiple of {BLOCK}")
    parts = () if gate_up_global_scale.dim() < 2 else (2,)
    expect("experts.gate_up.global_scale", gate_up_global_scale, (count, *parts), torch.float32)
    expect("experts.down.global_scale", down_global_scale, (count,), torch.float32)
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: got {limit}, wanted a positive number, or None for no clamp")


def _fake(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _triton_refuses(x, *args):
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


_TRTLLM, _CUTLASS = "flashinfer.nvfp4_moe_trtllm", "flashinfer.nvfp4_moe"
_CHECKPOINT_LAYOUT = (
    Kernel("flashinfer-trtllm", lazy(f"{_TRTLLM}.launch"), (100, 103), "flashinfer", lazy(f"{_TRTLLM}.refuse")),
    Kernel("flashinfer-cutlass", lazy(f"{_CUTLASS}.launch"), (100, 121), "flashinfer", lazy(f"{_CUTLASS}.refuse")),
    Kernel("triton", lazy("triton.nvfp4_moe.launch"), package="triton", refuse=_triton_refuses),
)
_CUDA, _W4A8 = "cuda.nvfp4_moe", "cuda.nvfp4_w4a8"
_KERNELS = (
    Kernel("cuda-w4a8", lazy(f"{_W4A8}.launch_moe"), (90, 90), "cuda.bindings", lazy(f"{_W4A8}.refuse_moe")),
    Kernel("cuda", lazy(f"{_CUDA}.launch"), (90, 90), "cuda.bindings", lazy(f"{_CUDA}.refuse")),
    *(in_checkpoint_layout(kernel, 4, 10) for kernel in _CHECKPOINT_LAYOUT),
)


@define(check=_check, fake=_fake, kernels=_KERNELS)
def _nvfp4_moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    down_global_scale: Tensor,
    limit: float | None = None,
) -> Tensor:
    if is_prepared(gate_up_scales):  # inner counts what fills its last tile: rows and columns of zeros
        hidden, inner = x.shape[1], TILE // 2 * gate_up_codes.shape[1]
        gate_up_codes, gate_up_scales = prepared.unpack(gate_up_codes, gate_up_scales, 2 * inner, hidden, True)
        down_codes, down_scales = prepared.unpack(down_codes, down_scales, hidden, inner, False)
    gate_up = NVFP4Weight(gate_up_codes, gate_up_scales, gate_up_global_scale)
    down = NVFP4Weight(down_codes, down_scales, down_global_scale)
    compute = torch.promote_types(x.dtype, torch.float32)
    return moe_loop(
        x,
        weights,
        ids,
        limit,
        count=gate_up_codes.shape[0],
        expert=lambda e: (gate_up[e].dequantize(compute), down[e].dequantize(compute)),
    )


def moe_loop(x: Tensor, weights: Tensor, ids: Tensor, limit: float | None, *, count: int, expert) -> Tensor:
    """The routed sum for weights in any format: `expert(e)` returns gate_up [2 * inner, hidden] and down.

    Ids outside 0..count-1 are skipped (experts of another rank). Summed in f32, in the order of ids' values.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape, dtype=compute, device=x.device)
    for e in ids.unique().tolist():
        if 0 <= e < count:
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate_up, down = expert(e)
            inner = swiglu.reference(x[token].to(compute) @ gate_up.mT, limit)
            total.index_add_(0, token, inner @ down.mT * weights[token, slot, None].to(compute))
    return total.to(x.dtype)


def nvfp4_moe(x: Tensor, weights: Tensor, ids: Tensor, experts: NVFP4Experts, limit: float | None = None) -> Tensor:
    """[tokens, hidden] float, f32 and i32 [tokens, top_k] -> [tokens, hidden]: the routed sum, no share expert.

    Ids outside the local experts are skipped. The reference keeps f32 between the two products (f64 for a
    float64 x) and rounds once, at the end; the kernels also round what swiglu returns to x's dtype, for that is
    what tensor cores multiply. `limit` is swiglu's.
    """
    gate_up, down = experts.gate_up, experts.down
    return _nvfp4_moe(
        x, weights, ids, gate_up.codes, gate_up.scales, gate_up.global_scale, down.codes, down.scales,
        down.global_scale, limit,
    )  # fmt: skip
