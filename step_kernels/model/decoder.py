"""A decoder layer, and the MTP layers that wrap one to draft tokens ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Attention
from .config import StepConfig
from .layers import MLP, RMSNorm, linear
from .moe import MoE


class DecoderLayer:
    """h += attention(norm(h)); h += mlp or moe(norm(h)). The second sum is left to the norm of the next layer."""

    def __init__(self, weights, index: int, config: StepConfig):
        name, layer = f"model.layers.{index}", config.layers[index]
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(weights, f"{name}.input_layernorm", hidden, eps)
        self.attention = Attention(weights, f"{name}.self_attn", index, layer, hidden, eps)
        self.post_norm = RMSNorm(weights, f"{name}.post_attention_layernorm", hidden, eps)
        if layer.moe:
            self.ffn = MoE(weights, name, layer, config)
        else:
            self.ffn = MLP(weights, f"{name}.mlp", hidden, config.intermediate_size, layer.shared_limit)

    def __call__(self, x: Tensor, addends: tuple[Tensor, ...], context) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h as x [tokens, hidden] and what is still to be added to it, and the same behind the layer."""
        normed, x = self.input_norm.of_sum(x, addends)
        normed, x = self.post_norm.of_sum(x, (self.attention(normed, context),))
        out = self.ffn(normed)
        return x, out if isinstance(out, tuple) else (out,)


class MTPLayer:
    """One draft depth: the next token's embedding and the hidden state before it -> the hidden state after it.

    Its item i holds token i + 1 + depth and the hidden state of item i one depth up (the trunk's, before the
    final norm, at depth 0). Items sit at positions i of a cache; rope needs only their differences.
    """

    def __init__(self, weights, depth: int, config: StepConfig):
        index = config.num_layers + depth
        name, hidden, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        self.embed_norm = RMSNorm(weights, f"{name}.enorm", hidden, eps)
        self.hidden_norm = RMSNorm(weights, f"{name}.hnorm", hidden, eps)
        self.eh_proj = weights.linear(f"{name}.eh_proj", hidden, 2 * hidden)
        self.decoder = DecoderLayer(weights, index, config)
        self.head_norm = RMSNorm(weights, f"{name}.transformer.shared_head.norm", hidden, eps)
        self.head = weights.linear(f"{name}.transformer.shared_head.output", config.vocab_size, hidden)

    def __call__(self, embedding: Tensor, hidden: Tensor, context) -> Tensor:
        """[tokens, hidden] twice -> [tokens, hidden], what the next depth takes."""
        joined = torch.cat((self.embed_norm(embedding), self.hidden_norm(hidden)), -1)
        x, addends = self.decoder(linear(joined, self.eh_proj), (), context)
        return sum(addends, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> f32 [..., vocab]."""
        return linear(self.head_norm(hidden), self.head, torch.float32)
