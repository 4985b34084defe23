"""CUDA graphs of a step: hundreds of launches as one, with nothing decided on the host in between."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..nvfp4 import NVFP4Experts
from ..registry import reference_only

OPS = ("moe_router", "swiglu", "rms_norm", "add_rms_norm", "nvfp4_linear", "nvfp4_moe", "kv_append", "paged_attention")


def capture(device: torch.device, run: Callable, pool=None) -> tuple[torch.cuda.CUDAGraph, object]:
    """Run once, which compiles and loads, then capture a second run; the graph and that run's outputs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        run()
        with torch.cuda.graph(graph, pool):
            outputs = run()
    return graph, outputs


def refusal(model) -> str | None:
    """Why this model's steps cannot be captured here, or None."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not all(isinstance(layer.ffn.experts, NVFP4Experts) for layer in model.layers if hasattr(layer.ffn, "experts")):
        return "the experts are not NVFP4: they run in a loop that the host drives"
    slow = [op for op in OPS if reference_only(op, model.device)]
    return f"{', '.join(slow)}: served by the reference, which the host drives" if slow else None
