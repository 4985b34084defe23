"""Calibration: a text's tokens go through the source model a layer at a time, and each weight's inputs are summed up.

One layer's weights are on the device at a time, the tokens' hidden states in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels.model.attention import WholeSequences
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import Checkpoint, CheckpointError
from step_kernels.model.config import StepConfig
from step_kernels.model.decoder import DecoderLayer
from step_kernels.model.layers import linear
from step_kernels.model.memory import Tapped
from step_kernels.model.weights import Weights
from step_kernels.nvfp4 import E2M1_MAX, E4M3_MAX
from step_kernels.ops import swiglu

from .hessian import block_hessians, products, shrunk
from .layout import weight_name

LENGTH, SEQUENCES = 2048, 512  # tokens of a sequence, and sequences, at most: 1.05 M tokens
HEADROOM = (
    2.0  # without it a quarter of the layers met larger inputs in other text, by 1.8 at most; it costs no accuracy
)
_AT_ONCE = 8192  # tokens in a layer: their f32 inner states of a dense MLP are 370 MB


def read_tokens(path: str | Path, folder: Path, config: StepConfig) -> Tensor:
    """A text in UTF-8, or token ids in a .npy file, any shape -> i64 [sequences, length], what is beyond cut off."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64, casting="safe").reshape(-1))
        else:
            text = path.read_text(encoding="utf-8")
            ids = torch.tensor(Chat(folder, config).tokenizer.encode(text, add_special_tokens=False).ids)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path}: not readable as calibration data: {e}") from None
    if not len(ids):
        raise CheckpointError(f"{path}: got no tokens, wanted text or a .npy file of token ids")
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= config.vocab_size)][0])
        raise CheckpointError(f"{path}: got token id {bad}, wanted 0 to {config.vocab_size - 1}")
    length = min(LENGTH, len(ids), config.max_positions)
    return ids[: min(SEQUENCES, len(ids) // length) * length].view(-1, length)


class Inputs:
    """What one weight is multiplied by, summed over the tokens; of each expert where there are several.

    `tokens` f32 [experts], `amax` f32 [], and with `search` hessian or gptq `sums`: of x x^T, f32 [experts, ...].
    """

    def __init__(self, k: int, search: str, experts: int, device: torch.device):
        self.tokens, self.amax = torch.zeros(experts, device=device), torch.zeros((), device=device)
        shape = {"hessian": (k // 16, 16, 16), "gptq": (k, k)}.get(search)
        self.sums = None if shape is None else torch.zeros((experts, *shape), device=device)

    def add(self, x: Tensor, expert: int = 0) -> None:
        """x [tokens, k]."""
        if len(x) == 0:
            return
        self.tokens[expert] += len(x)
        self.amax = torch.maximum(self.amax, x.abs().amax().float())
        if self.sums is not None:
            self.sums[expert] += products(x) if self.sums.dim() == 3 else block_hessians(x)

    @property
    def input_scale(self) -> float:
        """What engines that quantize inputs divide them by: the range of NVFP4 ends at HEADROOM times the largest."""
        return HEADROOM * float(self.amax) / (E2M1_MAX * E4M3_MAX) or 1.0

    def hessians(self, begin: int, end: int) -> Tensor:
        """A token's of these experts; one with few tokens leans on the mean over all."""
        return shrunk(self.sums[begin:end], self.tokens[begin:end], self._mean)

    @functools.cached_property
    def _mean(self) -> Tensor:
        """Over all experts; not before the last token has been added."""
        return self.sums.sum(0) / self.tokens.sum().clamp(min=1)


class Calibration:
    """`layers` runs `tokens` i64 [sequences, length] through the trunk.

    `leaders`: the weights whose inputs are wanted, one of each group that shares its input, by canonical name.
    """

    def __init__(self, checkpoint: Checkpoint, config: StepConfig, tokens: Tensor, device: torch.device, search: str):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config, self.search, self.length = config, search, tokens.shape[1]
        self.weights = Weights(checkpoint, device, dtype)
        table = self.weights.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        step = max(1, _AT_ONCE // self.length)
        self.hidden = [table[ids.to(device)].flatten(0, 1).cpu() for ids in tokens.split(step)]

    @torch.inference_mode()
    def layers(self, leaders: set[str], progress: bool = False) -> Iterator[tuple[int, dict[str, Inputs], Tensor]]:
        """Each layer's number, the inputs of those of its weights among `leaders`, and amax f32 [2] of keys and values.

        What it gives is to be used before the next is asked for.
        """
        device = self.weights.device
        for index in tqdm(range(self.config.num_layers), desc="calibrating", disable=None if progress else True):
            inputs: dict[str, Inputs] = {}
            layer = DecoderLayer(Tapped(self.weights, self._tap(leaders, inputs)), index, self.config)
            peaks = torch.zeros(2, device=device)
            for i, hidden in enumerate(self.hidden):
                context = _Peaks(len(hidden) // self.length, self.length, device, peaks)
                x, addends = layer(hidden.to(device), (), context)
                self.hidden[i] = sum(addends, x).cpu()
            for name, found in inputs.items():
                if not torch.isfinite(found.amax):
                    raise CheckpointError(f"{name}: calibration tokens reach it as NaN or infinity")
            yield index, inputs, peaks
            del layer, inputs

    def _tap(self, leaders: set[str], inputs: dict[str, Inputs]):
        def inputs_of(name: str, k: int, experts: int = 1) -> Inputs | None:
            if name in leaders:
                inputs[name] = Inputs(k, self.search, experts, self.weights.device)
            return inputs.get(name)

        def tap(name: str, value):
            if name.endswith(".moe"):
                layer, config = int(name.split(".")[2]), self.config
                gate, down = (weight_name(layer, projection) for projection in ("gate_proj", "down_proj"))
                return _Experts(
                    value,
                    config.num_experts,
                    inputs_of(gate, config.hidden_size, config.num_experts),
                    inputs_of(down, config.moe_intermediate_size, config.num_experts),
                )
            if name in leaders and isinstance(value, Tensor):
                return _Linear(value, inputs_of(name, value.shape[1]))
            return value

        return tap


class _Linear:
    """A weight that notes its inputs."""

    def __init__(self, weight: Tensor, inputs: Inputs):
        self.weight, self.shape, self.inputs = weight, weight.shape, inputs

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        self.inputs.add(x.flatten(0, -2))
        return linear(x, self.weight, out_dtype)


class _Experts:
    """Routed experts that note the inputs of both of their products."""

    def __init__(self, experts, count: int, gate_up: Inputs | None, down: Inputs | None):
        self.experts, self.count, self.gate_up, self.down = experts, count, gate_up, down

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
        total = torch.zeros(x.shape, device=x.device)
        order = ids.flatten().argsort(stable=True)
        for e, chosen in enumerate(order.split(ids.flatten().bincount(minlength=self.count).tolist())):
            if len(chosen) == 0:
                continue
            token = chosen // ids.shape[1]
            gate_up, down = self.experts.expert(e, x.dtype)
            mine = x[token]
            inner = swiglu(mine @ gate_up.mT, limit)
            for noted, seen in ((self.gate_up, mine), (self.down, inner)):
                if noted:
                    noted.add(seen, e)
            total.index_add_(0, token, (inner @ down.mT).float() * weights.flatten()[chosen, None])
        return total.to(x.dtype)


class _Peaks(WholeSequences):
    """A context that keeps the largest keys and values, as a cache would get them."""

    def __init__(self, batch: int, length: int, device: torch.device, peaks: Tensor):
        super().__init__(batch, length, device)
        self.peaks = peaks

    def attend(self, attention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        rotated = self.rotated(attention, k, attention.k_norm)
        self.peaks.copy_(torch.maximum(self.peaks, torch.stack([t.abs().amax().float() for t in (rotated, v)])))
        return super().attend(attention, q, k, v, gate)
