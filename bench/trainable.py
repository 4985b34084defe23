"""Step3p7's own layers with a backward pass: the same parameters, walked by functions that autograd can follow.

The ops' kernels are for inference; here norms, rope and SwiGLU are the ops' references (compiled on a GPU) and
the experts run as one grouped GEMM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model.attention import Attention
from step_kernels.model.decoder import DecoderLayer
from step_kernels.model.formats import DenseExperts
from step_kernels.model.layers import MLP, RMSNorm
from step_kernels.model.moe import MoE
from step_kernels.model.step import Step3p7
from step_kernels.ops import moe_topk, swiglu
from step_kernels.ops.kv_append import rope
from step_kernels.ops.rms_norm import normalized


class Parameters:
    """What Step3p7 asks of its weights, answered with f32 leaves; `tensors` holds them by name."""

    def __init__(self, device: torch.device, residual_branches: int, seed: int):
        self.device, self.dtype = device, torch.float32
        self.branches, self.tensors = residual_branches, {}
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> Tensor:
        """Gaussian by fan-in; what ends a residual branch is smaller by the root of their number; norms begin at 1."""
        x = torch.zeros(shape, device=self.device)
        if len(shape) == 1:
            x.fill_(0.1 if name.endswith("gamma") else 1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        else:
            std = shape[-1] ** -0.5 if len(shape) < 4 else (shape[1] * shape[2] * shape[3]) ** -0.5
            if "embed" in name:  # of tokens and of places: a lookup has no fan-in
                std = 0.1
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= self.branches**-0.5
            x.normal_(0, std, generator=self.generator)
        self.tensors[name] = x.requires_grad_(not name.endswith("router_bias"))
        return self.tensors[name]

    def scalar(self, name: str, default: float) -> Tensor:
        return torch.tensor(default, device=self.device)

    def linear(self, module: str, out: int, inner: int) -> Tensor:
        return self.tensor(f"{module}.weight", (out, inner))

    def experts(self, module: str, count: int, inner: int, hidden: int) -> DenseExperts:
        gate_up = self.tensor(f"{module}.gate_up_proj.weight", (count, 2 * inner, hidden))
        return DenseExperts(gate_up, self.tensor(f"{module}.down_proj.weight", (count, hidden, inner)))

    def finish(self) -> None:
        pass

    def checkpoint(self) -> dict[str, Tensor]:
        """The released names and dtypes: bf16, the router's bias f32, gate and up apart."""
        out = {}
        for name, x in self.tensors.items():
            x = x.detach().cpu()
            x = x if name.endswith("router_bias") else x.bfloat16()
            if "gate_up_proj" in name:
                for part, half in zip(("gate_proj", "up_proj"), x.chunk(2, 1)):
                    out[name.replace("gate_up_proj", part)] = half.contiguous()
            else:
                out[name] = x
        return out


class _Spread(torch.autograd.Function):
    """x [tokens, n] -> a row for each (token, choice), by expert; the way back adds a token's rows in order."""

    @staticmethod
    def forward(ctx, x, order, inverse, top_k):
        ctx.inverse, ctx.top_k = inverse, top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """Rows by expert -> rows by (token, choice)."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.order = order
        return x[inverse]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.order], None, None


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return normalized(x, weight, eps).to(dtype)


def _rotate(x: Tensor, weight: Tensor, eps: float, angle: Tensor, dtype: torch.dtype) -> Tensor:
    return rope(normalized(x, weight, eps), angle).to(dtype)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Trainable:
    """The model over rows of tokens, [rows, length], each from position 0; products in `dtype`, sums and norms f32."""

    def __init__(self, model: Step3p7, dtype: torch.dtype, compile: bool):
        self.model, self.dtype, self.counts = model, dtype, {}
        wrap = torch.compile(dynamic=False) if compile else lambda f: f
        self.norm, self.rotate, self.swiglu, self.losses = map(wrap, (_norm, _rotate, swiglu.reference, _losses))

    def features(self, views: Tensor, crops: Tensor) -> Tensor:
        """[9 * views + 4 * crops, hidden]: every view's features, then every crop's."""
        return torch.cat([self.model.vision(pixels).flatten(0, 1) for pixels in (views, crops)])

    def __call__(self, ids: Tensor, pictures: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """i64 [rows, length] -> hidden states [rows, length, hidden]: the trunk's before its last norm, then each draft
        depth's (its last 1 + depth places mean nothing). `pictures`: features and, for the last rows, i64 [some rows,
        length], the feature that an image token stands for."""
        model, (rows, length) = self.model, ids.shape
        embeddings = model.embed_tokens[ids]
        if pictures is not None:
            features, places = pictures[0].to(embeddings.dtype), pictures[1]
            text, last = embeddings.split((rows - len(places), len(places)))
            image = (ids[-len(places) :] == model.config.image_token_id)[..., None]
            embeddings = torch.cat((text, torch.where(image, features[places], last)))
        self.positions = torch.arange(length, device=ids.device)
        x = embeddings.flatten(0, 1)
        for layer in model.layers:
            x = self._layer(layer, x, rows)
        hidden = [x]
        for depth, layer in enumerate(model.mtp):
            ahead = torch.cat((embeddings[:, 1 + depth :], embeddings[:, : 1 + depth]), 1).flatten(0, 1)
            norms = (layer.embed_norm, ahead), (layer.hidden_norm, x)
            joined = torch.cat([self._norm(h, n) for n, h in norms], -1)
            x = self._layer(layer.decoder, F.linear(joined, layer.eh_proj).float(), rows)
            hidden.append(x)
        return [h.unflatten(0, (rows, length)) for h in hidden]

    def loss(self, tokens: Tensor, weights: Tensor, pictures: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """i64 and f32 [rows, length + 1] -> the weighted mean cross entropy of the trunk and of each draft depth."""
        model, length = self.model, tokens.shape[1] - 1
        heads = [(model.norm, model.lm_head), *((m.head_norm, m.head) for m in model.mtp)]
        losses = []
        for skip, x in enumerate(self(tokens[:, :length], pictures)):
            norm, head = heads[skip]
            targets, kept = tokens[:, 1:].roll(-skip, 1), weights[:, 1:].roll(-skip, 1).clone()
            kept[:, length - skip :] = 0
            logits = F.linear(self._norm(x.flatten(0, 1), norm), head)
            losses.append((self.losses(logits, targets.flatten()) * kept.flatten()).sum() / kept.sum())
        return losses

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self.norm(x, norm.weight, norm.eps, self.dtype)

    def _layer(self, layer: DecoderLayer, x: Tensor, rows: int) -> Tensor:
        normed = self._norm(x, layer.input_norm)
        x = x + self._attention(layer.attention, normed, rows)
        normed = self._norm(x, layer.post_norm)
        return x + (self._moe(layer.ffn, normed) if isinstance(layer.ffn, MoE) else self._mlp(layer.ffn, normed))

    def _attention(self, a: Attention, x: Tensor, rows: int) -> Tensor:
        config, positions = a.layer, self.positions
        *qkv, gate = (F.linear(x, w) for w in a.qkvg.weights)
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)).unflatten(0, (rows, -1)) for y in qkv)
        angle = positions.float()[:, None, None] * a.inv_freq
        q, k = (self.rotate(y, w, a.eps, angle, self.dtype) for y, w in ((q, a.q_norm), (k, a.k_norm)))
        group = config.heads // config.kv_heads
        q, k, v = q.transpose(1, 2), *(y.repeat_interleave(group, 2).transpose(1, 2) for y in (k, v))
        if config.window is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            behind = positions[:, None] - positions
            seen = (behind >= 0) & (behind < config.window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out = out.transpose(1, 2).flatten(0, 1) * gate.sigmoid()[..., None]
        return F.linear(out.flatten(-2), a.o)

    def _mlp(self, mlp: MLP, x: Tensor) -> Tensor:
        gate_up = torch.cat([F.linear(x, w) for w in mlp.gate_up.weights], -1)
        return F.linear(self.swiglu(gate_up, mlp.limit), mlp.down)

    def _moe(self, moe: MoE, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ moe.gate.mT
            weights, ids = moe_topk.reference(logits, moe.bias, moe.config.top_k, moe.config.router_scale)
        chosen, order = ids.flatten().sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        experts = torch.arange(moe.config.num_experts, device=x.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        self.counts[moe] = ends.diff(prepend=ends.new_zeros(1))
        spread = _Spread.apply(x, order, inverse, moe.config.top_k)
        gate_up, down = (w.to(self.dtype).mT for w in (moe.experts.gate_up, moe.experts.down))
        inner = self.swiglu(F.grouped_mm(spread, gate_up, offs=ends), moe.limit)
        out = _Collect.apply(F.grouped_mm(inner, down, offs=ends), order, inverse)
        routed = (out.unflatten(0, ids.shape) * weights[..., None]).sum(1)
        return routed + self._mlp(moe.share, x)

    @torch.no_grad()
    def balance(self, rate: Tensor) -> None:
        """Move each router's bias a step towards the experts that the last batch chose too rarely."""
        for moe, counts in self.counts.items():
            moe.bias += rate * (counts.float().mean() - counts).sign()
