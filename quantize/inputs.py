"""What weights are multiplied by in a calibration, and what stands in their place to note it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from step_kernels.model.layers import linear
from step_kernels.nvfp4 import E2M1_MAX, E4M3_MAX
from step_kernels.ops import swiglu

from .hessian import block_hessians, fitted, products, shrunk
from .layout import weight_name

GPTQ = "gptq"  # the search whose weights lean on those before them
# Other text may hold larger inputs. Up to 16 times too much range costs nothing, half of what is wanted 16 to 39 % of
# error: block scales have the precision of e4m3 over many octaves, but saturate.
HEADROOM = 2.0
_VISITS = 32768  # of an expert at once: its f32 outputs are 0.5 GB, and one may see all tokens


class Inputs:
    """What one weight is multiplied by, summed over the tokens; of each expert where there are several.

    `tokens` f32 [experts], `amax` f32 [], and with `search` hessian or gptq `sums`: of x x^T, f32 [experts, ...].
    For gptq these are `whole`, [k, k]; also `moved`, of (source's x - x) x^T, and `decoded`, by name `dtype`
    [experts, n, k]: what became of the weights.
    """

    def __init__(self, k: int, search: str, experts: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self.dtype, self.whole = dtype, search == GPTQ
        self.tokens, self.amax = torch.zeros(experts, device=device), torch.zeros((), device=device)
        shape = {"hessian": (k // 16, 16, 16), GPTQ: (k, k)}.get(search)
        self.sums = None if shape is None else torch.zeros((experts, *shape), device=device)
        self.moved: Tensor | None = None
        self.decoded: dict[str, Tensor] = {}

    def add(self, x: Tensor, expert: int = 0, moved: Tensor | None = None, share: Tensor | None = None) -> None:
        """x [tokens, k]; the source's less x; what a token's outputs are multiplied by, [tokens, 1]."""
        if len(x) == 0:
            return
        self.tokens[expert] += len(x)
        self.amax = torch.maximum(self.amax, x.abs().amax().float())
        if self.sums is not None:
            seen = x if share is None else x.float() * share
            self.sums[expert] += products(seen) if self.whole else block_hessians(seen)
        if moved is not None:
            if self.moved is None:
                self.moved = torch.zeros_like(self.sums)
            self.moved[expert] += products(moved, x)

    @property
    def input_scale(self) -> float:
        """What engines that quantize inputs divide them by: the range of NVFP4 ends at HEADROOM times the largest."""
        return HEADROOM * float(self.amax) / (E2M1_MAX * E4M3_MAX) or 1.0

    def hessians(self, begin: int, end: int) -> Tensor:
        """A token's of these experts; one with few tokens leans on the mean over all."""
        return shrunk(self.sums[begin:end], self.tokens[begin:end], self.mean)

    def wanted(self, begin: int, end: int, weight: Tensor, hessians: Tensor) -> Tensor:
        """Of these experts' weights [experts, n, k] what comes closest to the source's outputs with these inputs."""
        if self.moved is None:
            return weight
        moved = shrunk(self.moved[begin:end], self.tokens[begin:end])
        return fitted(weight, weight.float() @ moved, hessians)

    def take(self, begin: int, name: str, weight: Tensor, decoded: Tensor) -> None:
        """Notes for gptq what became of a weight of experts from `begin` on, [experts, n, k] twice."""
        if not self.whole:
            return
        if name not in self.decoded:
            held = decoded.new_empty(len(self.tokens), *weight.shape[1:], dtype=self.dtype)
            if held.is_cuda:  # its memory may be in use yet on this lane's stream, and all lanes write there
                torch.cuda.current_stream(held.device).synchronize()
            self.decoded.setdefault(name, held)
        self.decoded[name][begin : begin + len(weight)] = decoded

    @functools.cached_property
    def mean(self) -> Tensor:
        """Over all experts; not before the last token has been added."""
        return self.sums.sum(0) / self.tokens.sum().clamp(min=1)


class Shared(Inputs):
    """The inputs of experts whose outputs are summed: each is quantized in view of what the sum then lacks."""

    def share(self, experts: _Experts, same: list[Tensor], left: Tensor) -> None:
        """After the last token. `experts` have seen all; `left` f32 [tokens, hidden]: the source's hidden states behind
        the layer less those with what is quantized so far."""
        self.experts, self.left = experts, left
        self.x, self.weights, ids = (torch.cat(of) for of in zip(*experts.seen))
        experts.seen.clear()
        self.same, self.visits = torch.cat(same), _visits(ids, experts.count)

    def wanted(self, begin: int, end: int, weight: Tensor, hessians: Tensor) -> Tensor:
        pulls = torch.zeros(weight.shape, device=weight.device)
        for e, pull in enumerate(pulls, begin):
            for token, inner in self._inner(e):
                pull += (self.left[token] * self.same[token, None]).mT @ inner
        return fitted(weight, shrunk(pulls, self.tokens[begin:end]), hessians)

    @torch.inference_mode()
    def take(self, begin: int, name: str, weight: Tensor, decoded: Tensor) -> None:
        for e, change in enumerate(weight.float() - decoded, begin):
            for token, inner in self._inner(e):
                self.left.index_add_(0, token, inner @ change.mT)

    def _inner(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An expert's tokens, and its inputs f32 [tokens, k] times what the router weights its outputs by."""
        visits = self.visits[e]
        for some in visits.split(_VISITS) if len(visits) else ():
            token, weight = _tokens(some, self.weights)
            yield token, self.experts.inner(e, self.x[token]).float() * weight


class Tap:
    """Puts what notes its inputs in a weight's place, for a Calibration; `before`, the tap of the same layer before it
    was quantized, is there when it is."""

    def __init__(self, run, leaders: set[str], inputs: dict[str, Inputs], before: Tap | None = None):
        self.run, self.leaders, self.inputs, self.before = run, leaders, inputs, before
        self.decoded = {n: t for of in (before.inputs if before else {}).values() for n, t in of.decoded.items()}
        self.experts: _Experts | None = None

    def __call__(self, name: str, value):
        paired = self.run.quantized is not None
        if name.endswith(".moe"):
            layer, config = int(name.split(".")[2]), self.run.config
            gate, up, down = (weight_name(layer, f"{part}_proj") for part in ("gate", "up", "down"))
            self.experts = _Experts(value, config.num_experts, paired and not self.before)
            if not self.before:
                self.experts.gate_up = self._inputs(Inputs, gate, config.hidden_size, config.num_experts)
            elif gate in self.decoded:
                self.experts.quantized = torch.cat((self.decoded[gate], self.decoded[up]), 1)
            if self.before or not paired:
                kind = Shared if paired else Inputs
                self.experts.down = self._inputs(kind, down, config.moe_intermediate_size, config.num_experts)
            return self.experts
        if name in self.decoded:
            return self.decoded[name][0]
        if not self.before and name in self.leaders and isinstance(value, Tensor):
            return _Linear(value, self._inputs(Inputs, name, value.shape[1]), paired)
        return value

    def _inputs(self, kind: type[Inputs], name: str, k: int, experts: int = 1) -> Inputs | None:
        if name in self.leaders:
            self.inputs[name] = kind(k, self.run.search, experts, self.run.weights.device, self.run.weights.dtype)
        return self.inputs.get(name)


class _Linear:
    """A weight that notes its inputs; if `paired` of every second call, beside the source's of the one before."""

    def __init__(self, weight: Tensor, inputs: Inputs, paired: bool):
        self.weight, self.shape, self.inputs, self.paired = weight, weight.shape, inputs, paired
        self.source: Tensor | None = None

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        flat = x.flatten(0, -2)
        if self.paired and self.source is None:
            self.source = flat
        else:
            self.inputs.add(flat, moved=self.source - flat if self.paired else None)
            self.source = None
        return linear(x, self.weight, out_dtype)


class _Experts:
    """Routed experts that note the inputs of their products, if `paired` as _Linear does.

    `same` [tokens]: 1 where the experts are those of the source, elsewhere 0: how far such inputs have moved from the
    source's, and what the outputs lack, is not for an expert to make up for. `seen`: inputs, weights and ids.
    """

    def __init__(self, experts, count: int, paired: bool):
        self.experts, self.count, self.paired = experts, count, paired
        self.gate_up: Inputs | None = None
        self.down: Inputs | None = None
        self.quantized: Tensor | None = None  # gate and up [experts, 2 * inner, hidden]
        self.source: tuple[Tensor, Tensor] | None = None
        self.same: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
        self.limit, notes, moved = limit, True, None
        if self.paired and self.source is None:
            self.source, notes = (x, ids), False
        elif self.paired:
            (source, others), self.source = self.source, None
            self.same.append((ids.sort(-1)[0] == others.sort(-1)[0]).all(-1).float())
            moved = (source - x) * self.same[-1][:, None].to(x.dtype)
        if isinstance(self.down, Shared):
            self.seen.append((x, weights, ids))
        total = torch.zeros(x.shape, device=x.device)
        for e, chosen in enumerate(_visits(ids, self.count)):
            if len(chosen) == 0:
                continue
            token, weight = _tokens(chosen, weights)
            mine = x[token]
            inner = self.inner(e, mine)
            if notes and self.gate_up:
                self.gate_up.add(mine, e, None if moved is None else moved[token])
            if notes and self.down:
                self.down.add(inner, e, share=weight)
            total.index_add_(0, token, (inner @ self.experts.expert(e, x.dtype)[1].mT).float() * weight)
        return total.to(x.dtype)

    def inner(self, e: int, x: Tensor) -> Tensor:
        """What an expert's down_proj is multiplied by."""
        gate_up = self.experts.expert(e, x.dtype)[0] if self.quantized is None else self.quantized[e]
        return swiglu(x @ gate_up.mT, self.limit)


def _visits(ids: Tensor, count: int) -> tuple[Tensor, ...]:
    """ids [tokens, top_k] -> for each expert where it is in the flattened ids."""
    return ids.flatten().argsort(stable=True).split(ids.flatten().bincount(minlength=count).tolist())


def _tokens(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of an expert's visits the tokens, and what the router multiplies its outputs by, [visits, 1]."""
    return chosen // weights.shape[1], weights.flatten()[chosen, None]
