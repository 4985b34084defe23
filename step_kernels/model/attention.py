"""Grouped-query attention with a sigmoid gate a head; the context decides where keys and values live."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kv_append import rope
from ..ops.rms_norm import normalized
from .config import LayerConfig
from .layers import Linears, inverse_frequencies, linear


class Attention:
    """x [tokens, hidden] -> [tokens, hidden]. `index` is the layer's place in a cache, MTP layers after the trunk."""

    def __init__(self, weights, name: str, index: int, layer: LayerConfig, hidden: int, eps: float):
        q_size, kv_size = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        self.index, self.layer, self.eps = index, layer, eps
        rows = {"q": q_size, "k": kv_size, "v": kv_size, "g": layer.heads}
        self.qkvg = Linears(*(weights.linear(f"{name}.{part}_proj", n, hidden) for part, n in rows.items()))
        self.o = weights.linear(f"{name}.o_proj", hidden, q_size)
        self.q_norm = weights.tensor(f"{name}.q_norm.weight", (layer.head_dim,))
        self.k_norm = weights.tensor(f"{name}.k_norm.weight", (layer.head_dim,))
        self.k_scale = weights.scalar(f"{name}.k_proj.k_scale", 1.0)
        self.v_scale = weights.scalar(f"{name}.v_proj.v_scale", 1.0)
        self.inv_freq = inverse_frequencies(layer, self.q_norm.device)

    def __call__(self, x: Tensor, context) -> Tensor:
        *qkv, gate = self.qkvg(x)
        q, k, v = (y.unflatten(-1, (-1, self.layer.head_dim)) for y in qkv)
        out = context.attend(self, q, k, v, gate)
        return linear(out.flatten(-2), self.o)


class WholeSequences:
    """The context without a cache: tokens are [batch, length] flattened, each sequence from position 0."""

    def __init__(self, batch: int, length: int, device: torch.device):
        self.batch, self.length = batch, length
        self.positions = torch.arange(length, device=device)

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """q [batch * length, heads, d], k and v alike, gate [batch * length, heads] -> q's shape."""
        q, k = self.rotated(attention, q, attention.q_norm), self.rotated(attention, k, attention.k_norm)
        # v is a view of q, k and v's product: some of torch's kernels misread it (2.11 on an H200, bf16 with a mask)
        v = v.contiguous().unflatten(0, (self.batch, self.length))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        behind = self.positions[:, None] - self.positions
        seen = behind >= 0
        if attention.layer.window is not None:
            seen &= behind < attention.layer.window
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1) * gate.float().sigmoid().to(out.dtype)[..., None]

    def rotated(self, attention: Attention, x: Tensor, norm: Tensor) -> Tensor:
        """q or k [batch * length, heads, d] -> [batch, length, heads, d], normalized and turned by its positions."""
        angle = self.positions.float()[:, None, None] * attention.inv_freq
        return rope(normalized(x.unflatten(0, (self.batch, self.length)), norm, attention.eps), angle).to(x.dtype)
