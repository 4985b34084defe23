"""The mixture: a router in f32, eight of 288 experts, and a share expert that every token visits."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from ..ops import moe_router
from .config import LayerConfig, StepConfig
from .layers import MLP
from .weights import routed_sum

# Up to so many tokens the routed experts leave the memory idle for a third of their time: the share expert fits there.
FEW = 8


class MoE:
    """x [tokens, hidden] -> two tensors alike, to be added: the routed sum, which carries the router's scale, and the
    share expert's."""

    def __init__(self, weights, name: str, layer: LayerConfig, config: StepConfig):
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.config, self.limit = config, layer.limit
        self.gate = weights.tensor(f"{name}.moe.gate.weight", (experts, hidden), keep=True)
        self.bias = weights.tensor(f"{name}.moe.router_bias", (experts,), keep=True)
        self.experts = weights.experts(f"{name}.moe", experts, inner, hidden)
        self.share = MLP(weights, f"{name}.share_expert", hidden, config.share_expert_dim, layer.shared_limit)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with _beside(x) as join:
            shared = self.share(x)
        weights, ids = moe_router(x, self.gate, self.bias, self.config.top_k, self.config.router_scale)
        routed = routed_sum(x, weights, ids, self.experts, self.limit)
        join()
        return routed, shared


@contextlib.contextmanager
def _beside(x: Tensor):
    """In a captured decode step: kernels that run beside those behind them, until the yielded call joins both."""
    if not x.is_cuda or len(x) > FEW or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    here, there = torch.cuda.current_stream(x.device), _stream(x.device)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        yield lambda: here.wait_stream(there)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
