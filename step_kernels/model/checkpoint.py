"""Reading a checkpoint folder: every tensor of every shard, by header, and only the bytes asked for.

The index file is not trusted (the FP8 release's omits its scales); it only says which shards must be there.
Names are given in one scheme, the BF16 release's: `model.layers.N...`, `vision_model...`, `lm_head.weight`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_HEADER_MAX = 100 << 20  # bytes, the safetensors library's own limit
_READ_MAX = 1 << 30  # bytes a call: Linux reads at most 2^31 - 4096


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file or tensor, what it holds and what was wanted."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its name in the file, its file, and the bytes [begin, end) of that file."""

    stored_name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON: {e}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: got a JSON {type(data).__name__}, wanted an object")
    return data


def canonical(name: str) -> str:
    """The BF16 release's name of a tensor or module stored under any of the known prefixes."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    if name.startswith(("model.vision_model", "model.vit_large_projector", "model.lm_head")):
        return name.removeprefix("model.")
    return name


@dataclass(frozen=True)
class Piece:
    """The bytes [begin, end) of the entry's file."""

    entry: Entry
    begin: int
    end: int


def pieces(entry: Entry, most: int, rows: tuple[int, int] | None = None) -> list[Piece]:
    """The entry's bytes, or those of a range of its first dimension, in pieces of at most `most` bytes."""
    begin, end = entry.begin, entry.end
    if rows is not None:
        row = (end - begin) // entry.shape[0] if entry.shape[0] else 0
        begin, end = begin + rows[0] * row, begin + rows[1] * row
    return [Piece(entry, at, min(at + most, end)) for at in range(begin, end, most)]


def read_piece(piece: Piece, out: Tensor | None = None) -> Tensor:
    """The piece's bytes, u8 on the CPU, into `out` where it is given; CheckpointError names file and tensor."""
    entry = piece.entry
    buffer = torch.empty(piece.end - piece.begin, dtype=torch.uint8) if out is None else out
    try:
        with entry.file.open("rb", buffering=0) as f:
            f.seek(piece.begin)
            view, got = memoryview(buffer.numpy()), 0
            while got < len(view):
                n = f.readinto(view[got : got + _READ_MAX])
                if not n:
                    raise CheckpointError(
                        f"{entry.file}: {entry.stored_name}: the file ends early (changed while being read?)"
                    )
                got += n
    except OSError as e:
        raise CheckpointError(f"{entry.file}: {entry.stored_name}: {e.strerror}") from None
    return buffer


def _once(file: Path, pairs: list[tuple[str, object]]) -> dict:
    """A header's object; of a key given twice json would keep the last, and a tensor would be lost unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise CheckpointError(f"{file}: {key}: is in the header more than once")
    return found


def read_header(file: Path) -> tuple[dict[str, Entry], dict]:
    """Entries of one safetensors file under their stored names, checked against the file's size; its metadata."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{file}: got {size} bytes, wanted a safetensors file (8 bytes of header length)")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, _HEADER_MAX):
                raise CheckpointError(f"{file}: header length {length} exceeds the file ({size} bytes) or the limit")
            header = json.loads(f.read(length), object_pairs_hook=partial(_once, file))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found") from None
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: the header is not JSON: {e}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(header).__name__}, wanted an object")
    metadata = header.pop("__metadata__", None)
    entries, data = {}, 8 + length
    for name, info in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES.get(info["dtype"]), tuple(info["shape"]), info["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            sound = sound and math.prod(max(n, 1) for n in shape) < 2**63  # torch's limit, even for empty tensors
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: {name}: the header lacks dtype, shape or data_offsets") from None
        if dtype is None:
            raise CheckpointError(f"{file}: {name}: dtype {info['dtype']}, wanted one of {', '.join(DTYPES)}")
        if not sound or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file}: {name}: bytes {begin} to {end} do not hold {info['dtype']} {list(shape)}")
        if data + end > size:
            raise CheckpointError(f"{file}: {name}: ends at byte {data + end}, the file has {size} (truncated?)")
        entries[name] = Entry(name, file, dtype, shape, data + begin, data + end)
    last = None
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if last is not None and entry.begin < last.end:
            raise CheckpointError(f"{file}: {last.stored_name} and {entry.stored_name} overlap")
        last = entry
    return entries, metadata if isinstance(metadata, dict) else {}


class Checkpoint:
    """A checkpoint folder opened for reading. `entries` maps canonical names to where the bytes lie, `metadata` each
    file's name to what its header says of it."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: not a folder")
        self.config = read_json(self.folder / "config.json")
        files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / INDEX
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise CheckpointError(f"{index}: weight_map is missing or not a map of names")
            for shard in sorted(set(shards.values()) - {f.name for f in files}):
                raise CheckpointError(f"{self.folder / shard}: not found, but {INDEX} lists it")
        if not files:
            raise CheckpointError(f"{self.folder}: no *.safetensors file in it")
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict] = {}
        for file in files:
            entries, self.metadata[file.name] = read_header(file)
            for name, entry in entries.items():
                known = self.entries.setdefault(canonical(name), entry)
                if known is not entry:
                    raise CheckpointError(f"{file}: {name} is also in {known.file.name} as {known.stored_name}")
        if index.exists():
            for name in shards:
                if canonical(name) not in self.entries:
                    raise CheckpointError(f"{self.folder / shards[name]}: {name} is missing, but {INDEX} lists it")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """The entry of a canonical name."""
        try:
            return self.entries[name]
        except KeyError:
            if any(other.endswith(".weight_packed") for other in self.entries):
                wanted = "wanted BF16, FP8 or modelopt's NVFP4"
                raise CheckpointError(f"{self.folder}: holds compressed-tensors' layout, {wanted} ({name})") from None
            raise CheckpointError(f"{self.folder}: tensor {name} is missing") from None

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        """The tensor as stored, on the CPU; with `begin` and `end`, that range of its first dimension alone."""
        entry = self.entry(name)
        shape, rows = entry.shape, None
        if begin is not None:
            if not 0 <= begin <= end <= shape[0]:
                raise CheckpointError(f"{name}: got the range {begin} to {end}, wanted one within {shape[0]}")
            shape, rows = (end - begin, *shape[1:]), (begin, end)
        whole = pieces(entry, max(entry.end - entry.begin, 1), rows)
        return read_piece(whole[0]).view(entry.dtype).reshape(shape) if whole else torch.empty(shape, dtype=entry.dtype)
