"""A model's parameters as its device holds them, in one safetensors file: nothing to prepare when they are loaded.

Names are the canonical ones. In place of `module`.weight a prepared NVFP4 weight has `module`.codes, .scales and
.global_scale (experts: gate_up_proj and down_proj), a weight made FP8 .codes and .scale. The header's metadata says so.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor

from ..nvfp4 import NVFP4Experts
from ..ops import prepares
from ..prepared import PreparedWeight, tiles
from .checkpoint import DTYPES, INDEX, Checkpoint, CheckpointError
from .formats import FP8Channels
from .weights import Weights

FILE = "prepared.safetensors"
# Hopper's layout is the one there is; another, or a change of this one's bytes, is another version.
METADATA = {"format": "pt", "step_kernels.prepared": "1", "step_kernels.layout": "sm_90"}
_HEADER = 2 << 20  # bytes: the released model's 2,400 tensors take 400 kB


class PreparedCopy(Weights):
    """A prepared copy's parameters; CheckpointError on a device or in a dtype whose kernels want another layout."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *arguments, **options):
        super().__init__(checkpoint, device, dtype, *arguments, **options)
        for file, found in checkpoint.metadata.items():
            for key, wanted in METADATA.items():
                if found.get(key) != wanted:
                    got = f"{key} {found[key]}" if key in found else f"no {key}"
                    raise CheckpointError(
                        f"{checkpoint.folder / file}: got {got}, wanted {wanted}: prepare the original again"
                    )
            if device.type != "meta" and not (dtype == torch.bfloat16 and prepares(device)):
                raise CheckpointError(
                    f"{checkpoint.folder / file}: prepared for bfloat16 on {METADATA['step_kernels.layout']}, got "
                    f"{str(dtype).removeprefix('torch.')} on {device}: load the original"
                )

    @staticmethod
    def made(checkpoint: Checkpoint) -> bool:
        """Whether the folder is a prepared copy, of whatever version."""
        return any("step_kernels.prepared" in metadata for metadata in checkpoint.metadata.values())

    def linear(self, module: str, out: int, inner: int) -> Tensor | PreparedWeight | FP8Channels:
        if f"{module}.global_scale" in self.checkpoint:
            return self._prepared_weight(module, (), out, inner, ())
        if f"{module}.scale" in self.checkpoint:
            self._expect(f"{module}.codes", (out, inner), (torch.float8_e4m3fn,))
            self._expect(f"{module}.scale", (out,), (torch.float32,))
            return FP8Channels(self._read(f"{module}.codes"), self._read(f"{module}.scale"))
        return super().linear(module, out, inner)

    def experts(self, module: str, count: int, inner: int, hidden: int) -> NVFP4Experts:
        gate_up = self._prepared_weight(f"{module}.gate_up_proj", (count,), 2 * inner, hidden, (2,))
        return NVFP4Experts(gate_up, self._prepared_weight(f"{module}.down_proj", (count,), hidden, inner, ()))

    def _prepared_weight(self, module: str, lead: tuple, n: int, k: int, parts: tuple) -> PreparedWeight:
        rows, columns = tiles(n, k, bool(parts))
        self._expect(f"{module}.codes", (*lead, rows, columns, 2048), (torch.uint8,))
        self._expect(f"{module}.scales", (*lead, rows, columns, 256), (torch.uint8,))
        self._expect(f"{module}.global_scale", (*lead, *parts), (torch.float32,))
        tensors = (self._read(f"{module}.{part}") for part in ("codes", "scales", "global_scale"))
        return PreparedWeight(*tensors, torch.Size((*lead, n, k)), bool(parts))


class Copy:
    """A prepared copy being written beside `target` and moved there at the end of a `with` block that succeeds."""

    def __init__(self, source: str | os.PathLike, target: str | os.PathLike, device: torch.device):
        self.source, self.target = Path(source), Path(target)
        if self.target.exists():
            raise CheckpointError(f"{target}: is there already, wanted a folder to be made")
        if not prepares(device):
            raise ValueError(f"device: got {device}, wanted a Hopper GPU, and cuda-bindings installed")
        self.partial = self.target.with_name(self.target.name + ".partial")
        self.header: dict[str, dict] = {"__metadata__": METADATA}

    def __enter__(self) -> Copy:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        for file in self.source.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".py") and file.name != INDEX:
                shutil.copy(file, self.partial)
        self.file = (self.partial / FILE).open("wb")
        self.file.seek(8 + _HEADER)
        return self

    def __exit__(self, kind, *_) -> None:
        with self.file:
            if kind is None:
                header = json.dumps(self.header).encode()
                self.file.seek(0)
                self.file.write(struct.pack("<Q", _HEADER) + header.ljust(_HEADER))
                self.file.flush()
                os.fsync(self.file.fileno())
        if kind is None:
            self.partial.rename(self.target)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, value):
        """Write a parameter as a model's modules get it, and hand it back without its bytes."""
        module = name.removesuffix(".weight")
        if isinstance(value, Tensor):
            return self._write(name, value)
        if isinstance(value, NVFP4Experts) and isinstance(value.gate_up, PreparedWeight):
            return NVFP4Experts(
                self.add(f"{name}.gate_up_proj", value.gate_up), self.add(f"{name}.down_proj", value.down)
            )
        if isinstance(value, FP8Channels):
            return FP8Channels(self._write(f"{module}.codes", value.codes), self._write(f"{module}.scale", value.scale))
        if isinstance(value, PreparedWeight):
            parts = (self._write(f"{module}.{p}", getattr(value, p)) for p in ("codes", "scales", "global_scale"))
            return PreparedWeight(*parts, value.shape, value.paired)
        raise CheckpointError(f"{self.source}: {name}: got {type(value).__name__}, wanted experts in NVFP4")

    def _write(self, name: str, tensor: Tensor) -> Tensor:
        begin = self.file.tell() - 8 - _HEADER
        self.file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()))
        stored = next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype)
        offsets = [begin, self.file.tell() - 8 - _HEADER]
        self.header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": offsets}
        return tensor.to("meta")
