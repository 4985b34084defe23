"""A dry run: what would become of every tensor, the room it needs, and the time, after a few seconds' measuring."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from step_kernels import nvfp4
from step_kernels.model.checkpoint import DTYPES, Checkpoint, CheckpointError, Piece, read_piece

from . import jobs, lanes
from .convert import kept_files
from .layout import FP8, NVFP4, fp8_bytes, nvfp4_bytes
from .matrices import pieces, quantize_piece
from .matrices import read_piece as read_weight
from .plan import Plan, Settings, make_plan, resolve_source
from .sensitivity import mixed
from .shards import Shard

_SAMPLE = 256 << 20  # bytes read, and as many written, to measure a disk
_BLOCK = 16 << 20
_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Action:
    """What becomes of a tensor: its bytes in the source, those that it becomes (scales included), and in which file.

    `what`: copy, quantize (to NVFP4) or fp8.
    """

    what: str
    name: str
    tensor: str
    read: int
    written: int
    file: str


@dataclass(frozen=True)
class Estimate:
    """Bytes, and bytes a second. `quantized` are the bytes of the source that are computed on."""

    read: int
    written: int
    quantized: int
    free: int
    reading: float
    writing: float
    quantizing: float
    one_disk: bool

    @property
    def seconds(self) -> float:
        """The slowest of reading, quantizing and writing, which overlap; on one disk reading and writing add up."""
        disk = (self.read / self.reading, self.written / self.writing)
        return max(self.quantized / self.quantizing, sum(disk) if self.one_disk else max(disk))


def actions(plan: Plan) -> list[Action]:
    """One for each tensor of the source, by file and name."""
    found = []
    for entry, file, name in plan.copies:
        size = entry.end - entry.begin
        found.append(Action("copy", name, f"{_DTYPE[entry.dtype]} {list(entry.shape)}", size, size, file))
    for group in plan.groups:
        for weight, (file, name) in zip(group.weights, group.outputs):
            entry = plan.checkpoint.entry(weight)
            tensor, size = f"{_DTYPE[entry.dtype]} {list(entry.shape)}", jobs.source_bytes(plan.checkpoint, weight)
            what, count = {NVFP4: ("quantize", nvfp4_bytes), FP8: ("fp8", fp8_bytes)}[group.precision]
            found.append(Action(what, name, tensor, size, count(entry.shape), file))
    return sorted(found, key=lambda action: (action.file, action.name))


def table(plan: Plan, every: bool) -> list[str]:
    """The plan in lines: a line a tensor with its file, or a line for each kind of tensor over all layers."""
    lines = [f"{'action':<9}{'tensors':>8}{'read':>13}{'written':>13}  name"]
    found = actions(plan)
    if every:
        rows = [(a.what, 1, a.read, a.written, f"{a.name}, {a.tensor}, {a.file}") for a in found]
    else:
        kinds: dict[tuple[str, str], list[Action]] = {}
        for action in sorted(found, key=lambda a: a.what, reverse=True):
            kinds.setdefault((action.what, _kind(action)), []).append(action)
        rows = [
            (what, len(of), sum(a.read for a in of), sum(a.written for a in of), kind)
            for (what, kind), of in kinds.items()
        ]
    return lines + [
        f"{what:<9}{count:>8}{read / 1e6:>10,.1f} MB{written / 1e6:>10,.1f} MB  {name}"
        for what, count, read, written, name in rows
    ]


def estimate(
    source: str | Path,
    target: str | Path,
    settings: Settings | None = None,
    *,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[Plan, Estimate]:
    """The plan of `run` with these arguments, and what it would cost; raises what `run` would.

    Times the source's disk, the target's (with a file that is gone afterwards) and the search on the devices.
    """
    devices, source, folder = lanes.devices(device), resolve_source(source), Path(target)
    kept_files(source, folder, resume=False)
    plan = make_plan(Checkpoint(source), settings or Settings())
    if plan.settings.recipe == "mixed":
        plan = mixed(plan, devices[0], progress)
    while not folder.exists():
        folder = folder.parent
    number = lanes.count(devices, max(jobs.host_bytes(plan.checkpoint, group) for group in plan.groups))
    try:
        free, one_disk = shutil.disk_usage(folder).free, os.stat(folder).st_dev == os.stat(source).st_dev
        with lanes.Lanes(devices, number) as pool:
            reading, quantizing = _read_rate(plan, pool), _quantize_rate(plan, pool, number)
        writing = _write_rate(folder, min(_SAMPLE, free // 2))
    except OSError as e:
        raise CheckpointError(f"{folder}: {e.strerror}") from None
    found = actions(plan)
    read, quantized = sum(a.read for a in found), sum(a.read for a in found if a.what == "quantize")
    metadata = plan.metadata
    written = sum(Shard(folder / file, tensors, metadata).size for file, tensors in plan.shards.items())
    return plan, Estimate(read, written, quantized, free, reading, writing, quantizing, one_disk)


def _kind(action: Action) -> str:
    """Its name without numbers; of what is copied only the module: there are hundreds of small tensors."""
    name = re.sub(r"\.\d+\.", ".*.", action.name)
    if action.what != "copy":
        return f"{name}, {action.tensor}"
    top = re.match(r"(.*?layers\.\*\.\w+|(?:model\.)?vision_model|.*?)(\.|$)", name)
    return f"{top[1]}.*" if top[2] and not name.endswith(f"{top[1]}.weight") else name


def _read_rate(plan: Plan, pool: lanes.Lanes) -> float:
    """Bytes a second of the source's disk, from what lies in no cache: its pages are dropped first."""
    parts, left = [], _SAMPLE
    for entry in sorted(plan.checkpoint.entries.values(), key=lambda entry: entry.begin - entry.end):
        for at in range(entry.begin, entry.end, _BLOCK):
            if left > 0:
                parts.append(Piece(entry, at, min(at + _BLOCK, entry.end)))
                left -= _BLOCK
    for part in parts:
        with part.entry.file.open("rb") as f, contextlib.suppress(AttributeError):  # macOS has no posix_fadvise
            os.posix_fadvise(f.fileno(), part.begin, part.end - part.begin, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for job in [pool.submit(lambda part: read_piece(part, *lanes.buffers(part.end - part.begin)), p) for p in parts]:
        job.result()
    return sum(part.end - part.begin for part in parts) / (time.perf_counter() - start)


def _write_rate(folder: Path, size: int) -> float:
    block = os.urandom(max(1, min(_BLOCK, size)))
    with tempfile.TemporaryFile(dir=folder) as f:
        start = time.perf_counter()
        for _ in range(max(1, size // len(block))):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        return f.tell() / (time.perf_counter() - start)


def _quantize_rate(plan: Plan, pool: lanes.Lanes, number: int) -> float:
    """Bytes of the source a second, all lanes at work on a piece of the largest weight."""
    leaders = (group.weights[0] for group in plan.groups if group.precision == NVFP4)
    weight = max(leaders, key=lambda weight: jobs.source_bytes(plan.checkpoint, weight))
    entry = plan.checkpoint.entry(weight)
    begin, end = pieces(entry.shape)[0][0]
    x, amax = read_weight(plan.checkpoint, weight, begin, end)
    scale = nvfp4.global_scale(amax, plan.settings.plain_search)

    def work() -> float:
        here, outer = x.to(lanes.device()), scale.to(lanes.device())
        quantize_piece(here, outer, plan.settings.plain_search)  # the first one compiles and allocates
        start = time.perf_counter()
        for _ in range(3):
            quantize_piece(here, outer, plan.settings.plain_search)
        return 3 * (entry.end - entry.begin) / entry.shape[0] * (end - begin) / (time.perf_counter() - start)

    return sum(job.result() for job in [pool.submit(work) for _ in range(number)])
