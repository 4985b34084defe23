"""Step's clamped SwiGLU: min(silu(gate), limit) * clamp(up, -limit, limit), rounded once at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Kernel, define, expect, lazy

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check(gate_up, limit=None):
    expect("gate_up", gate_up, (..., None), FLOATS)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got last dimension {gate_up.shape[-1]}, wanted an even one")
    check_limit(limit)


def check_limit(limit):
    """ValueError unless `limit` is one that swiglu takes."""
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: got {limit}, wanted a positive number, or None for no clamp")


def _fake(gate_up, limit=None):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _cuda_refuses(gate_up, limit=None):
    from ..cuda.swiglu import refuse

    return refuse(gate_up, limit)


def _triton_refuses(gate_up, limit=None):
    if gate_up.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"


@define(
    check=_check,
    fake=_fake,
    kernels=(
        Kernel("cuda", lazy("cuda.swiglu.launch"), (90, 129), "cuda.bindings", _cuda_refuses),
        Kernel("triton", lazy("triton.swiglu.launch"), package="triton", refuse=_triton_refuses),
    ),
)
def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """[..., 2n] -> [..., n], gate first. The clamp comes after silu: above only on gate, both sides on up.

    Computed in f32 (f64 for a float64 input). `limit=None` does not clamp. Source: swiglu_limits of the
    Step-3.7-Flash release, 7 for routed and 16 for shared experts of its last layers.
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    gate = F.silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * up).to(gate_up.dtype).contiguous()
