"""Grouped-query attention with a sigmoid gate a head; the context decides where keys and values live."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kv_append import rope
from ..ops.rms_norm import normalized
from .config import LayerConfig
from .layers import inverse_frequencies, linear


class Attention:
    """x [tokens, hidden] -> [tokens, hidden]. `index` is the layer's place in a cache, MTP layers after the trunk."""

    def __init__(self, weights, name: str, index: int, layer: LayerConfig, hidden: int, eps: float):
        q_size, kv_size = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        self.index, self.layer, self.eps = index, layer, eps
        self.q = weights.linear(f"{name}.q_proj", q_size, hidden)
        self.k = weights.linear(f"{name}.k_proj", kv_size, hidden)
        self.v = weights.linear(f"{name}.v_proj", kv_size, hidden)
        self.o = weights.linear(f"{name}.o_proj", hidden, q_size)
        self.g = weights.linear(f"{name}.g_proj", layer.heads, hidden)
        self.q_norm = weights.tensor(f"{name}.q_norm.weight", (layer.head_dim,))
        self.k_norm = weights.tensor(f"{name}.k_norm.weight", (layer.head_dim,))
        self.k_scale = weights.scalar(f"{name}.k_proj.k_scale", 1.0)
        self.v_scale = weights.scalar(f"{name}.v_proj.v_scale", 1.0)
        self.inv_freq = inverse_frequencies(layer, self.q_norm.device)

    def __call__(self, x: Tensor, context) -> Tensor:
        q = linear(x, self.q).unflatten(-1, (self.layer.heads, self.layer.head_dim))
        k, v = (linear(x, w).unflatten(-1, (self.layer.kv_heads, self.layer.head_dim)) for w in (self.k, self.v))
        out = context.attend(self, q, k, v, linear(x, self.g))
        return linear(out.flatten(-2), self.o)


class WholeSequences:
    """The context without a cache: tokens are [batch, length] flattened, each sequence from position 0."""

    def __init__(self, batch: int, length: int, device: torch.device):
        self.batch, self.length = batch, length
        self.positions = torch.arange(length, device=device)

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """q [batch * length, heads, d], k and v alike, gate [batch * length, heads] -> q's shape."""
        angle = self.positions.float()[:, None, None] * attention.inv_freq
        q, k = (
            rope(normalized(x.unflatten(0, (self.batch, self.length)), norm, attention.eps), angle).to(x.dtype)
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v.unflatten(0, (self.batch, self.length))))
        behind = self.positions[:, None] - self.positions
        seen = behind >= 0
        if attention.layer.window is not None:
            seen &= behind < attention.layer.window
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1) * gate.float().sigmoid().to(out.dtype)[..., None]
