"""The conversion: an expert slice (gate and up: a pair) or as much of a linear in memory at a time, in any model."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels import __version__, nvfp4
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError, read_json

from .errors import Errors
from .layout import projection_name
from .matrices import label, pieces, quantize_piece, read_piece
from .modelopt import layer_number, metadata_files
from .plan import Group, Plan, Settings, UsageError, make_plan, resolve_source
from .shards import PART, Shard, copy_side_files, read_chunks, write_file

STATE = "nvfp4-conversion.json"  # in the target until it is verified


@dataclass
class Summary:
    """What a run did. `bytes_in` and `bytes_out` are of this run: a resumed one does not count what it found done."""

    errors: Errors = field(default_factory=Errors)
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(
    source: str | Path,
    target: str | Path,
    settings: Settings | None = None,
    *,
    verify: bool = True,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = False,
) -> Summary:
    """Converts folder `source` to NVFP4 in `target`, the index last. With `verify`, `problems` lists what is wrong.

    Raises UsageError for arguments that cannot be meant, CheckpointError for what cannot be read, used or written.
    """
    start, settings = time.monotonic(), settings or Settings()
    source, target = resolve_source(source), Path(target)
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"device: got {device}, but torch finds no GPU here")
    kept = _kept_files(source, target, resume)
    conversion = _Conversion(make_plan(Checkpoint(source), settings), target, device, progress)
    if not kept or conversion.recall():
        conversion.write()
    elif not conversion.is_finished():
        raise UsageError(f"{target}: holds files, but no stopped conversion ({STATE}) to resume")
    summary = conversion.summary
    if verify:
        from .verify import verify as check  # here, or `python -m quantize.verify` would find itself loaded already

        summary.problems = check(target, source, errors=False, progress=progress).problems
    # A refused result loses its index, so that no loader takes it for a finished one.
    (target / (INDEX if summary.problems else STATE)).unlink(missing_ok=True)
    summary.seconds = time.monotonic() - start
    return summary


def _kept_files(source: Path, target: Path, resume: bool) -> bool:
    """Whether an earlier run left whole files in the target, after refusing a target that cannot be meant."""
    try:
        files = list(target.iterdir()) if target.exists() else []
        same = target.exists() and source.exists() and source.samefile(target)
    except OSError as e:
        raise CheckpointError(f"{target}: {e.strerror}, wanted a folder to write to") from None
    if same:
        raise UsageError(f"{target}: is the source too, wanted another folder")
    if files and not resume:
        raise UsageError(f"{target}: is not empty, wanted a new folder (--resume goes on with a stopped conversion)")
    return any(f.suffix != PART for f in files)


class _Conversion:
    def __init__(self, plan: Plan, target: Path, device: str, progress: bool):
        self.plan, self.target, self.device, self.progress = plan, target, torch.device(device), progress
        self.checkpoint, self.summary = plan.checkpoint, Summary()
        metadata = {"format": "pt", "producer": f"step-kernels {__version__}", "conversion": plan.digest}
        self.shards = {f: Shard(target / f, tensors, metadata) for f, tensors in sorted(plan.shards.items())}
        self.done: set[str] = set()
        self.errors: dict[str, list] = {}  # shard -> rows of layer, projection, error, power
        self.bar = None

    def recall(self) -> bool:
        """Takes up what an earlier run left, if it left a state; a different conversion's is an error."""
        path = self.target / STATE
        if not path.exists():
            return False
        state = read_json(path)
        if state.get("digest") != self.plan.digest:
            raise UsageError(f"{self.target}: was begun with other settings, another source or version; start anew")
        errors = state.get("errors", {})
        self.done = {file for file, shard in self.shards.items() if file in errors and shard.is_whole()}
        self.errors = {file: errors[file] for file in self.done}
        return True

    def is_finished(self) -> bool:
        """Whether the target is the whole result of this very conversion."""
        files = {self.target / name: data for name, data in self._metadata().items()}
        described = all(file.is_file() and file.read_bytes() == data for file, data in files.items())
        return described and all(shard.is_whole() for shard in self.shards.values())

    def write(self) -> None:
        """Every shard that is not there yet, then the other files, the index last."""
        self._prepare()
        groups = [g for g in self.plan.groups if any(file not in self.done for file, _ in g.outputs)]
        copies = [c for c in self.plan.copies if c[1] not in self.done]
        total = sum(self._size(w) for g in groups for w in g.weights) + sum(e.end - e.begin for e, _, _ in copies)
        quiet = None if self.progress else True  # None: unless stderr is a terminal
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing", disable=quiet) as self.bar:
                for file in self.shards:
                    if file not in self.done:
                        self._shard(file, copies, groups)
        finally:
            for shard in self.shards.values():
                shard.close()
        metadata = self._metadata()
        skip = {STATE, *metadata}
        self.summary.left_out = copy_side_files(self.checkpoint.folder, self.target, skip)
        if "auto_map" in self.checkpoint.config:
            self.summary.left_out.append("config.json's auto_map")
        for name, data in metadata.items():
            write_file(self.target / name, data)
        rows = {(layer, projection): sums for file in self.errors.values() for layer, projection, *sums in file}
        for weight in (w for group in self.plan.groups for w in group.weights):  # the model's order, not the shards'
            key = layer_number(weight), projection_name(weight)
            if key in rows:
                self.summary.errors.add(*key, *rows[key])

    def _prepare(self) -> None:
        try:
            self.target.mkdir(parents=True, exist_ok=True)
            for shard in self.shards.values():
                shard.part.unlink(missing_ok=True)
            free = shutil.disk_usage(self.target).free
        except OSError as e:
            raise CheckpointError(f"{self.target}: {e.strerror}") from None
        needed = sum(shard.size for file, shard in self.shards.items() if file not in self.done)
        if needed > free:
            raise CheckpointError(f"{self.target}: {free:,} bytes are free, wanted {needed:,}")
        self._save_state()

    def _shard(self, file: str, copies: list, groups: list[Group]) -> None:
        """Finishes one shard. A group may write to a later shard too, which then has less to do in its turn."""
        shard = self.shards[file]
        for _, name, value in (c for c in self.plan.constants if c[0] == file):
            shard.write(name, _bytes(torch.full(self.plan.shards[file][name][1], value)))
        for entry, _, name in (c for c in copies if c[1] == file):
            at = 0
            for data in read_chunks(entry):
                shard.write(name, data, at)
                at += len(data)
                self._count(len(data))
        for group in [g for g in groups if any(f == file for f, _ in g.outputs)]:
            groups.remove(group)
            self._group(group)
        self.errors.setdefault(file, [])
        self._save_state()  # before the rename: a shard with its name on has its errors in the state
        shard.finish()
        self.done.add(file)
        self.summary.bytes_out += shard.size

    def _group(self, group: Group) -> None:
        """Quantizes weights that share global scales; of what lies in a finished shard only amax is taken."""
        live = [i for i, (file, _) in enumerate(group.outputs) if file not in self.done]
        shapes, search = [self.checkpoint.entry(name).shape for name in group.weights], self.plan.settings.search
        scales, sums = torch.empty(shapes[0][:-2]), {i: torch.zeros(2, dtype=torch.float64) for i in live}
        for matrix, ranges in enumerate(zip(*map(pieces, shapes))):
            held, scale = self._shared_scale(group.weights, ranges, label(shapes[0], matrix))
            scales.view(-1)[matrix] = scale
            for i in live:
                file, name = group.outputs[i]
                for begin, end in ranges[i]:
                    # A linear of several pieces is read again: its scale needs all of them, memory holds but one.
                    weight = group.weights[i]
                    x = held[i] if len(ranges[i]) == 1 else read_piece(self.checkpoint, weight, begin, end)[0]
                    codes, blocks, error = quantize_piece(x, scale, search, self.device)
                    sums[i] += error
                    for output, data in ((name, codes), (f"{name}_scale", blocks)):
                        self.shards[file].write(output, _bytes(data), data.nbytes // (end - begin) * begin)
        for i in live:
            (file, name), weight = group.outputs[i], group.weights[i]
            self.shards[file].write(f"{name}_scale_2", _bytes(scales))
            row = [layer_number(weight), projection_name(weight), *sums[i].tolist()]
            self.errors.setdefault(file, []).append(row)

    def _shared_scale(self, weights: tuple[str, ...], ranges: tuple, which: str) -> tuple[list[Tensor], Tensor]:
        """The last piece of each weight, and the global scale f32 [] by the amax of all pieces of all of them."""
        held, amax = [], []
        for weight, parts in zip(weights, ranges):
            for begin, end in parts:
                x, top = read_piece(self.checkpoint, weight, begin, end)
                amax.append(top)
                self._count(self._size(weight) // self.checkpoint.entry(weight).shape[0] * (end - begin))
            held.append(x)
        scale = nvfp4.global_scale(torch.stack(amax).amax(), self.plan.settings.search)
        if not scale > 0:
            raise CheckpointError(f"{weights[0]}: {which}weights are too small, amax {max(amax)}")
        return held, scale

    def _metadata(self) -> dict[str, bytes]:
        return metadata_files(self.checkpoint.config, self.plan.patterns, self.plan.settings.kv_cache, self.shards)

    def _save_state(self) -> None:
        state = {"digest": self.plan.digest, "errors": self.errors}
        write_file(self.target / STATE, json.dumps(state).encode())

    def _size(self, weight: str) -> int:
        entry = self.checkpoint.entry(weight)
        return entry.end - entry.begin

    def _count(self, read: int) -> None:
        self.summary.bytes_in += read
        self.bar.update(read)


def _bytes(t: Tensor):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy()
