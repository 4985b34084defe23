"""NVFP4 weights into the layout that a GPU's kernels read, once at load, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import prepared
from ..nvfp4 import NVFP4Experts, NVFP4Weight
from ..prepared import PreparedWeight
from ..registry import Kernel, compute_capability, forced, lazy

_ON_HOPPER = Kernel("cuda", lazy("cuda.nvfp4_prepare.pack"), (90, 90), "cuda.bindings")


def prepares(device: torch.device) -> bool:
    """Whether weights are to be prepared for this device: it packs them, and no backend is forced that refuses them."""
    return forced() in (None, "cuda", "cuda-w4a8") and _packs(device)


def _packs(device: torch.device) -> bool:
    """It is a Hopper GPU and cuda-bindings is installed."""
    return device.type == "cuda" and _ON_HOPPER.refusal(compute_capability(device.index)) is None


def nvfp4_prepare(weight: NVFP4Weight | NVFP4Experts) -> PreparedWeight | NVFP4Experts:
    """A weight, or experts with gate and up rows paired, in the prepared layout; the original stays as it is.

    For a linear's weight, pass NVFP4Weight [n, k]. Negative and NaN block scales, which no quantizer writes, raise
    ValueError: the one question for which this function waits for the GPU.
    """
    if isinstance(weight, NVFP4Experts):
        return NVFP4Experts(_prepare(weight.gate_up, True), _prepare(weight.down, False))
    return _prepare(weight, False)


def nvfp4_restore(weight: PreparedWeight | NVFP4Experts) -> NVFP4Weight | NVFP4Experts:
    """What nvfp4_prepare was given, every byte of it."""
    if isinstance(weight, NVFP4Experts):
        return NVFP4Experts(nvfp4_restore(weight.gate_up), nvfp4_restore(weight.down))
    n, k = weight.shape[-2:]
    codes, scales = _run("unpack", weight.codes, weight.scales, n, k, weight.paired)
    return NVFP4Weight(codes, scales, weight.global_scale)


def _prepare(weight: NVFP4Weight, paired: bool) -> PreparedWeight:
    if (weight.scales.view(torch.uint8) > 0x7E).any():
        raise ValueError("weight.scales: got a negative or NaN block scale, wanted 0 to 448")
    codes, scales = _run("pack", weight.codes.contiguous(), weight.scales.contiguous(), paired)
    return PreparedWeight(codes, scales, weight.global_scale, weight.shape, paired)


def _run(function: str, codes: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    if _packs(codes.device):
        with torch.cuda.device(codes.device):
            return lazy(f"cuda.nvfp4_prepare.{function}")(codes, *arguments)
    return getattr(prepared, function)(codes, *arguments)
