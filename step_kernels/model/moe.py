"""The mixture: a router in f32, eight of 288 experts, and a share expert that every token visits."""

from __future__ import annotations

from torch import Tensor

from ..ops import moe_topk
from .config import LayerConfig, StepConfig
from .layers import MLP
from .weights import routed_sum


class MoE:
    """x [tokens, hidden] -> [tokens, hidden]. Only the routed sum carries the router's scale."""

    def __init__(self, weights, name: str, layer: LayerConfig, config: StepConfig):
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.config, self.limit = config, layer.limit
        self.gate = weights.tensor(f"{name}.moe.gate.weight", (experts, hidden), keep=True)
        self.bias = weights.tensor(f"{name}.moe.router_bias", (experts,), keep=True)
        self.experts = weights.experts(f"{name}.moe", experts, inner, hidden)
        self.share = MLP(weights, f"{name}.share_expert", hidden, config.share_expert_dim, layer.shared_limit)

    def __call__(self, x: Tensor) -> Tensor:
        logits = x.float() @ self.gate.mT  # bf16 logits would change which experts are chosen
        weights, ids = moe_topk(logits, self.bias, self.config.top_k, self.config.router_scale)
        return routed_sum(x, weights, ids, self.experts, self.limit) + self.share(x)
