"""The mixture: a router in f32, eight of 288 experts, and a share expert that every token visits."""

from __future__ import annotations

from torch import Tensor

from ..ops import moe_router
from .config import LayerConfig, StepConfig
from .layers import MLP
from .weights import routed_sum


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
        weights, ids = moe_router(x, self.gate, self.bias, self.config.top_k, self.config.router_scale)
        routed = routed_sum(x, weights, ids, self.experts, self.limit)
        return routed, self.share(x)
