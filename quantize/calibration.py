"""Calibration: a text's tokens go through the source model a layer at a time, and each weight's inputs are summed up.

One layer's weights are on the device at a time, the tokens' hidden states in host memory. For gptq the tokens go
through the quantized layers too: their inputs count, and each weight is to make up for what the layers before and the
experts quantized before it have changed (arXiv 2504.02692 does so for the layers).
"""

from __future__ import annotations

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
from step_kernels.model.memory import Tapped
from step_kernels.model.weights import Weights

from .inputs import GPTQ, Inputs, Tap

LENGTH, SEQUENCES = 2048, 512  # tokens of a sequence, and sequences, at most: 1.05 M tokens
# Tokens in a layer at once. The f32 inner states of 8192 in a dense MLP are 370 MB; a GPU has the room, and each time
# there are 288 Hessians to be added to.
_AT_ONCE = {"cpu": 8192, "cuda": 32768}


def read_tokens(path: str | Path, folder: Path, config: StepConfig) -> Tensor:
    """A text in UTF-8, or token ids in a .npy file -> i64 [sequences, length], what is beyond cut off.

    Ids in two dimensions are sequences of their own, as documents are; a text, and other ids, are cut into them.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64, casting="safe"))
        else:
            text = path.read_text(encoding="utf-8")
            ids = torch.tensor(Chat(folder, config).tokenizer.encode(text, add_special_tokens=False).ids)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path}: not readable as calibration data: {e}") from None
    if not ids.numel():
        raise CheckpointError(f"{path}: got no tokens, wanted text or a .npy file of token ids")
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= config.vocab_size)][0])
        raise CheckpointError(f"{path}: got token id {bad}, wanted 0 to {config.vocab_size - 1}")
    longest = min(LENGTH, config.max_positions)
    if ids.dim() != 2:
        length = min(longest, ids.numel())
        ids = ids.flatten()[: ids.numel() // length * length].view(-1, length)
    ids = ids[:, :longest]
    return ids[: LENGTH * SEQUENCES // ids.shape[1]].contiguous()


class Calibration:
    """`layers` runs `tokens` i64 [sequences, length] through the trunk.

    `leaders`: the weights whose inputs are wanted, one of each group that shares its input, by canonical name.
    """

    def __init__(self, checkpoint: Checkpoint, config: StepConfig, tokens: Tensor, device: torch.device, search: str):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config, self.search, self.length = config, search, tokens.shape[1]
        self.weights = Weights(checkpoint, device, dtype)
        table = self.weights.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        step = max(1, _AT_ONCE[device.type] // self.length)
        self.hidden = [_kept(table[ids.to(device)].flatten(0, 1), device) for ids in tokens.split(step)]
        # behind the same layers, quantized
        self.quantized = [_kept(hidden, device) for hidden in self.hidden] if search == GPTQ else None

    @torch.inference_mode()
    def layers(self, leaders: set[str], progress: bool = False) -> Iterator[tuple[int, dict[str, Inputs], Tensor]]:
        """Each layer's number, the inputs of those of its weights among `leaders`, and amax f32 [2] of keys and values.

        What it gives is to be used before the next is asked for. For gptq a mixture comes twice, the second time with
        down_proj: its inputs are what the quantized gate and up give.
        """
        device = self.weights.device
        for index in tqdm(range(self.config.num_layers), desc="calibrating", disable=None if progress else True):
            inputs: dict[str, Inputs] = {}
            tap = Tap(self, leaders, inputs)
            layer, peaks = DecoderLayer(Tapped(self.weights, tap), index, self.config), torch.zeros(2, device=device)
            for i, hidden in enumerate(self.hidden):
                hidden.copy_(self._run(layer, hidden, peaks))  # first the source's, then what is compared with it
                if self.quantized is not None:
                    self._run(layer, self.quantized[i], peaks)
            del layer
            yield index, _finished(inputs), peaks
            if self.quantized is not None:
                yield from self._again(index, tap, peaks)

    def _again(self, index: int, tap: Tap, peaks: Tensor) -> Iterator[tuple[int, dict[str, Inputs], Tensor]]:
        """The layer once more, quantized but for its experts' down_proj, which comes last."""
        for found in tap.inputs.values():
            found.sums = found.moved = None  # 38 GB of a layer of 288 experts
        tap = Tap(self, tap.leaders, {}, before=tap)
        layer = DecoderLayer(Tapped(self.weights, tap), index, self.config)
        device, tokens = self.weights.device, [len(hidden) for hidden in self.hidden]
        lacks = torch.empty(sum(tokens) if tap.inputs else 0, self.config.hidden_size, device=device)  # 17 GB at most
        for i, hidden in enumerate(self.quantized):
            out = self._run(layer, hidden, peaks)
            if tap.inputs:
                lacks.split(tokens)[i].copy_(self.hidden[i].to(device).float() - out)
            hidden.copy_(out)
        del layer
        for shared in tap.inputs.values():
            shared.share(tap.experts, tap.before.experts.same, lacks)
            yield index, _finished(tap.inputs), peaks
            for source, hidden, left in zip(self.hidden, self.quantized, lacks.split(tokens)):
                hidden.copy_((source.to(device).float() - left).to(hidden.dtype))

    def _run(self, layer: DecoderLayer, hidden: Tensor, peaks: Tensor) -> Tensor:
        device = self.weights.device
        context = _Peaks(len(hidden) // self.length, self.length, device, peaks)
        x, addends = layer(hidden.to(device), (), context)
        return sum(addends, x)


def _kept(hidden: Tensor, device: torch.device) -> Tensor:
    """A copy in host memory, for a GPU such as it reads and writes ten times as fast."""
    return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=device.type == "cuda").copy_(hidden)


def _finished(inputs: dict[str, Inputs]) -> dict[str, Inputs]:
    for name, found in inputs.items():
        if not torch.isfinite(found.amax):
            raise CheckpointError(f"{name}: calibration tokens reach it as NaN or infinity")
        if found.sums is not None:
            _ = found.mean  # worked out here, on the stream that the lanes wait for
    return inputs


class _Peaks(WholeSequences):
    """A context that keeps the largest keys and values, as a cache would get them."""

    def __init__(self, batch: int, length: int, device: torch.device, peaks: Tensor):
        super().__init__(batch, length, device)
        self.peaks = peaks

    def attend(self, attention, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        rotated = self.rotated(attention, k, attention.k_norm)
        self.peaks.copy_(torch.maximum(self.peaks, torch.stack([t.abs().amax().float() for t in (rotated, v)])))
        return super().attend(attention, q, k, v, gate)
