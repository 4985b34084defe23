"""What lies in a folder with an NVFP4 checkpoint, in any of the layouts met, whatever its state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from step_kernels.model.checkpoint import (
    DTYPES,
    INDEX,
    Checkpoint,
    CheckpointError,
    Entry,
    canonical,
    pieces,
    read_header,
    read_json,
    read_piece,
)
from step_kernels.model.config import StepConfig

from .formats import COMPRESSED, MODELOPT, Channels, Stored, stored
from .layout import FP8, FP8_BLOCK, expert_shapes, layer_number, tensor_shapes, weight_modules
from .modelopt import HF_QUANT_CONFIG

DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class Contents(Checkpoint):
    """A checkpoint opened for looking at: `faults` has a line for what Checkpoint would raise for, by file."""

    def __init__(self, folder: str | Path):
        self.folder, self.faults = Path(folder), []
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: not a folder")
        self.config = read_json(self.folder / "config.json")
        self.entries, self.metadata, self.files = {}, {}, sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise CheckpointError(f"{self.folder}: no *.safetensors file in it")
        for file in self.files:
            try:
                entries, self.metadata[file.name] = read_header(file)
            except CheckpointError as e:
                self.faults.append((file.name, str(e).removeprefix(f"{file}: ")))
                continue
            for name, entry in entries.items():
                known = self.entries.setdefault(canonical(name), entry)
                if known is not entry:
                    self.faults.append((file.name, f"{name} is also in {known.file.name} as {known.stored_name}"))
        self.index, self.index_fault = _json(self.folder / INDEX)
        self.hf_quant_config, self.hf_quant_fault = _json(self.folder / HF_QUANT_CONFIG)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(e.end - e.begin for e in self.entries.values())


def _json(path: Path) -> tuple[dict, str]:
    """A file's object, or an empty one and what is wrong with it."""
    try:
        return read_json(path), ""
    except CheckpointError as e:
        return {}, str(e).removeprefix(f"{path}: ")


class Model:
    """The weights of a checkpoint sorted by its config: `quantized` (those in NVFP4, -> what stores them), `channels`
    (those in FP8, likewise) and `left` (-> shape).

    `groups`: the weights with one global scale, since engines hold them in one matrix; `missing_mtp`: MTP layers by
    number of which no tensor is there.
    """

    def __init__(self, contents: Contents):
        self.contents = contents
        self.config = StepConfig.from_dict(contents.config, str(contents.folder / "config.json"))
        names = contents.entries
        self.compressed = any(name.endswith(".weight_packed") for name in names)
        self.per_expert = any(".moe.experts." in name for name in names)
        form, experts = COMPRESSED if self.compressed else MODELOPT, expert_shapes(self.config)
        shapes = tensor_shapes(self.config) | experts
        self.quantized: dict[str, list[Stored]] = {}
        self.channels: dict[str, list[Channels]] = {}
        self.groups: list[tuple[str, ...]] = []
        for module, groups in weight_modules(self.config).items():
            # Engines hold a layer's routed experts in one module, other projections group by group.
            together = [tuple(w for group in groups for w in group)] if module.endswith(".moe") else groups
            for weights in together:
                if any(self._is_quantized(w, experts) for w in weights):
                    self.quantized |= {w: stored(w, w, shapes[w], form, self.per_expert) for w in weights}
                elif any(self._is_fp8(w, experts) for w in weights):
                    self.channels |= {w: stored(w, w, shapes[w], form, False, FP8) for w in weights}
            self.groups += [group for group in groups if group[0] in self.quantized]
        self.left = {n: shape for n, shape in shapes.items() if n not in self.quantized and n not in self.channels}
        layers = {layer_number(name) for name in names}
        self.missing_mtp = [i for i in range(self.config.num_layers, len(self.config.layers)) if i not in layers]

    def _is_quantized(self, weight: str, experts: dict) -> bool:
        entry = self.contents.entries.get(weight)
        if entry is None:  # routed experts that are not there are missed in NVFP4
            return weight in experts or f"{weight}_packed" in self.contents
        return not entry.dtype.is_floating_point

    def _is_fp8(self, weight: str, experts: dict) -> bool:
        entry = self.contents.entries.get(weight)
        return entry is not None and entry.dtype == torch.float8_e4m3fn and weight not in experts


def read_rows(checkpoint: Checkpoint, name: str, matrix: int, begin: int, end: int) -> Tensor:
    """Rows of a matrix [n, k] or of one of a stack [matrices, n, k] -> [rows, k], from an FP8 source in f32.

    Codes with block scales of NVFP4 or row scales beside them come as they are.
    """
    entry = checkpoint.entry(name)
    x = _rows(entry, matrix, begin, end)
    if x.dtype != torch.float8_e4m3fn or name.endswith("_scale") or f"{name}_scale" in checkpoint:
        return x
    first, last = begin // FP8_BLOCK, -(-end // FP8_BLOCK)
    inverse = _rows(checkpoint.entry(f"{name}_scale_inv"), matrix, first, last)
    rows = torch.arange(begin, end) // FP8_BLOCK - first
    return x.float() * inverse[rows].repeat_interleave(FP8_BLOCK, 1)[:, : x.shape[1]]


def _rows(entry: Entry, matrix: int, begin: int, end: int) -> Tensor:
    *_, n, k = entry.shape
    flat = dataclasses.replace(entry, shape=(entry.shape[0] * n if len(entry.shape) == 3 else n, k))
    (piece,) = pieces(flat, entry.end - entry.begin, (matrix * n + begin, matrix * n + end))
    return read_piece(piece).view(entry.dtype).view(end - begin, k)
