"""The conversion: a lane a thread, in each an expert (gate and up: a pair) or as much of a linear at a time."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError, read_json
from step_kernels.nvfp4 import E4M3_MAX

from . import card, jobs, lanes
from .calibration import Calibration
from .errors import Errors
from .figures import Weight
from .inputs import GPTQ, Inputs, Shared
from .jobs import Output
from .lanes import Lanes
from .layout import FP8, layer_number, projection_name
from .matrices import label, pieces
from .modelopt import HF_QUANT_CONFIG, metadata_files
from .plan import Group, Plan, Settings, UsageError, make_plan, resolve_source
from .sensitivity import mixed
from .shards import CHUNK, PART, Shard, copy_side_files, write_file

STATE = "nvfp4-conversion.json"  # in the target until it is verified


@dataclass
class Summary:
    """What a run did. `bytes_in` and `bytes_out` are of this run: a resumed one does not count what it found done.

    `seconds` are without the verification's. `host_peak` and `gpu_peak` (of the GPU with the most) are bytes.
    `left_out`: files not copied; `zeros`: weights, or experts of them, that are zero throughout.
    """

    errors: Errors = field(default_factory=Errors)
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    verify_seconds: float = 0.0
    host_peak: int = 0
    gpu_peak: int = 0
    left_out: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    weights: dict[tuple[int | None, str], Weight] = field(default_factory=dict)
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
    report: str | Path | None = None,
    precisions: dict[str, str] | None = None,
) -> Summary:
    """Converts folder `source` to NVFP4 in `target`, the index last. With `verify`, `problems` lists what is wrong.

    `precisions`: of some linears, in place of the recipe's, as make_plan takes them.
    Raises UsageError for arguments that cannot be meant, CheckpointError for what cannot be read, used or written.
    """
    start, settings = time.monotonic(), settings or Settings()
    if report is not None:
        from . import report as written  # here, for it needs this module

        written.ready(report, target)
    source, target = resolve_source(source), Path(target)
    devices = lanes.devices(device)
    kept = kept_files(source, target, resume)
    plan = make_plan(Checkpoint(source), settings, precisions)
    if settings.recipe == "mixed" and precisions is None:
        plan = mixed(plan, devices[0], progress, _state(target).get("damages"))
    conversion = _Conversion(plan, target, devices, progress)
    if not kept or conversion.recall():
        conversion.write()
    elif not conversion.is_finished():
        raise UsageError(f"{target}: holds files, but no stopped conversion ({STATE}) to resume")
    summary = conversion.summary
    summary.seconds = time.monotonic() - start
    summary.host_peak, summary.gpu_peak = lanes.host_peak(), lanes.gpu_peak(devices)
    if verify:
        from .verify import verify as check  # here, or `python -m quantize.verify` would find itself loaded already

        summary.problems = check(target, source, errors=False, progress=progress).problems
    # A refused result loses its index, so that no loader takes it for a finished one.
    (target / (INDEX if summary.problems else STATE)).unlink(missing_ok=True)
    summary.verify_seconds = time.monotonic() - start - summary.seconds
    if report is not None:
        before = summary.bytes_out < sum(shard.size for shard in conversion.shards.values())
        figures = written.describe(conversion.plan, target, device, summary, verify, summary.weights, before)
        written.write(report, figures)
    return summary


def kept_files(source: Path, target: Path, resume: bool) -> bool:
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


def _state(target: Path) -> dict:
    """What a stopped run noted in the target; empty where none has."""
    return read_json(target / STATE) if (target / STATE).exists() else {}


class _Conversion:
    def __init__(self, plan: Plan, target: Path, devices: list[torch.device], progress: bool):
        self.plan, self.target, self.devices, self.progress = plan, target, devices, progress
        self.checkpoint, self.summary = plan.checkpoint, Summary()
        metadata = plan.metadata
        self.shards = {f: Shard(target / f, tensors, metadata) for f, tensors in sorted(plan.shards.items())}
        self.done: set[str] = set()
        self.errors: dict[str, list] = {}  # shard -> rows of layer, projection, what was noted, zero matrices
        self.outputs: dict[str, list[tuple[str, Output]]] = {}  # shard -> weights under way, by their source's name
        self.under_way: dict[str, list[Future]] = {}  # what each shard without its name waits for
        self.groups: dict[Group, None] = {}  # whose work has not been put yet
        self.values: dict[tuple[int | None, str], float] = {}  # calibrated scales, as Constant names them
        self.bar, self.lock = None, threading.Lock()

    def recall(self) -> bool:
        """Takes up what an earlier run left, if it left a state; a different conversion's is an error."""
        state = _state(self.target)
        if not state:
            return False
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
        # gptq's weights lean on those before them: what is there already is worked out again, and not written
        again = [g for g in self.plan.groups if self.plan.settings.search == GPTQ and self._is_calibrated(g)]
        groups = [g for g in self.plan.groups if g in again or any(file not in self.done for file, _ in g.outputs)]
        copies = [c for c in self.plan.copies if c[1] not in self.done]
        total = sum(jobs.source_bytes(self.checkpoint, w) for g in groups for w in g.weights)
        total += sum(entry.end - entry.begin for entry, _, _ in copies)
        # gptq's lanes share what they note of the layer
        devices = self.devices[:1] if self.plan.settings.search == GPTQ else self.devices
        number = lanes.count(devices, max((jobs.host_bytes(self.checkpoint, g) for g in groups), default=0))
        if self.plan.tokens is not None:
            number = min(number, 2 * len(devices))  # each has many matrices at a time
        quiet = None if self.progress else True  # None: unless stderr is a terminal
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc="quantizing", disable=quiet) as self.bar:
                with Lanes(devices, number) as pool:
                    self.groups = dict.fromkeys(groups)
                    self.under_way = {file: [] for file in self.shards if file not in self.done}
                    if self.plan.tokens is not None:
                        self._calibrate(pool, copies)
                    for file in self.under_way:
                        self._submit_copies(pool, file, copies)
                        for group in [g for g in self.groups if any(f == file for f, _ in g.outputs)]:
                            self._submit(pool, group)
                    for file in list(self.under_way):
                        self._finish(file)
        finally:
            for shard in self.shards.values():
                shard.close()
        self._sum_up()
        metadata, renamed = self._metadata(), {card.CARD: card.SOURCE_CARD}
        skip = {STATE, HF_QUANT_CONFIG, card.SOURCE_CARD, *metadata}
        self.summary.left_out = copy_side_files(self.checkpoint.folder, self.target, skip, renamed)
        write_file(self.target / card.CARD, card.page(self.plan, self.summary.errors))
        if "auto_map" in self.checkpoint.config:
            self.summary.left_out.append("config.json's auto_map")
        for name, data in metadata.items():
            write_file(self.target / name, data)

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
        self.errors = {file: self.errors[file] for file in self.done}
        self._save_state()

    def _submit_copies(self, pool: Lanes, file: str, copies: list) -> None:
        for entry, _, name in [c for c in copies if c[1] == file]:
            for at in range(0, entry.end - entry.begin, CHUNK):
                self.under_way[file].append(pool.submit(self._job, jobs.copy, entry, at, self.shards[file], name))

    def _submit(self, pool: Lanes, group: Group, inputs: Inputs | None = None) -> list[Future]:
        """Puts a group's work behind what is there already."""
        del self.groups[group]
        count = len(pieces(self.checkpoint.entry(group.weights[0]).shape))
        pairs = zip(group.weights, group.outputs)
        outputs = [self._output(*output, weight, count, group.precision) for weight, output in pairs]
        live = [(f, w, output) for (f, _), w, output in zip(group.outputs, group.weights, outputs) if output]
        for into, weight, output in live:
            self.outputs.setdefault(into, []).append((weight, output))
        if inputs is not None:
            for _, _, output in live:
                output.noted.add_tokens(inputs.tokens)
        if group.precision == FP8:
            parts = [(rows, w, output) for _, w, output in live for rows in pieces(self.checkpoint.entry(w).shape)[0]]
            under_way = [pool.submit(self._job, jobs.to_fp8, *rows, self.checkpoint, *of) for rows, *of in parts]
        else:
            if inputs is not None and inputs.sums is not None:
                job, step, how = jobs.quantize_for_inputs, jobs.at_once(self.checkpoint, group, inputs), inputs
            else:
                job, step, how = jobs.quantize, 1, self.plan.settings.plain_search
            if isinstance(inputs, Shared):  # about one of each token's experts at a time
                step = min(step, max(1, count // self.plan.config.top_k))
            ends = [(at, min(at + step, count)) if how is inputs else (at,) for at in range(0, count, step)]
            if isinstance(inputs, Shared):
                job, ends = jobs.quantize_in_turn, [(ends,)]
            under_way = [pool.submit(self._job, job, *some, self.checkpoint, group, outputs, how) for some in ends]
        for into in {into for into, _, _ in live}:
            self.under_way[into] += under_way
        return under_way

    def _calibrate(self, pool: Lanes, copies: list) -> None:
        """Runs the tokens through the trunk and quantizes a layer's weights when it has seen their inputs.

        Shards get their names as soon as they are whole, so that a stopped run has less to do again.
        """
        settings, device = self.plan.settings, self.devices[0]
        if device.type == "cuda":  # torch loads its linear algebra at the first use, which lanes must not be at once
            torch.linalg.cholesky(torch.eye(1, device=device))
        run = Calibration(self.checkpoint, self.plan.config, self.plan.tokens, device, settings.search)
        trunk = {group.weights[0]: group for group in self.groups if self._is_calibrated(group)}
        for group in [group for group in self.groups if group.precision == FP8]:
            self._submit(pool, group)
        for index, inputs, peaks in run.layers(set(trunk), self.progress):
            for letter, peak in zip("kv", peaks.tolist()):
                if settings.kv_scales == "calibrated":
                    self.values[index, f"{letter}_scale"] = peak / E4M3_MAX or 1.0
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # lanes have streams of their own
            under_way = []
            for leader, found in inputs.items():
                group = trunk[leader]
                for weight in group.weights:
                    self.values[index, f"{projection_name(weight)}.input_scale"] = found.input_scale
                under_way += self._submit(pool, group, found)
            for job in under_way:
                job.result()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            left = {file for group in self.groups for file, _ in group.outputs}
            late = {constant.file for constant in self.plan.constants if (constant.layer or 0) > index}
            for file in [f for f in self.under_way if f not in left | late]:
                self._submit_copies(pool, file, copies)
                self._finish(file)

    def _is_calibrated(self, group: Group) -> bool:
        """Whether it is quantized by its inputs: no token reaches MTP layers and the head, and FP8 needs none."""
        layer = layer_number(group.weights[0])
        return group.precision != FP8 and layer is not None and layer < self.plan.config.num_layers

    def _output(self, file: str, name: str, weight: str, matrices: int, precision: str) -> Output | None:
        """None for a weight of a finished shard, of which only the amax is taken."""
        if file in self.done:
            return None
        return Output(self.shards[file], self.plan.stored(weight, name, precision), Weight.zeros(matrices))

    def _job(self, job, *arguments) -> None:
        count = job(*arguments)
        with self.lock:
            self.summary.bytes_in += count
            self.bar.update(count)

    def _finish(self, file: str) -> None:
        """Waits until a shard has all of its weights, then gives it its name."""
        shard = self.shards[file]
        for constant in (c for c in self.plan.constants if c.file == file):
            value = self.values.get((constant.layer, constant.what), 1.0)
            value = torch.full(self.plan.shards[file][constant.name][1], value)
            shard.write(constant.name, jobs.as_bytes(1 / value if constant.inverse else value))
        for job in self.under_way.pop(file):
            job.result()
        self.errors[file] = [
            [layer_number(weight), projection_name(weight), output.noted.state(), sorted(output.zeros)]
            for weight, output in self.outputs.pop(file, [])
        ]
        self._save_state()  # before the rename: a shard with its name on has its errors in the state
        shard.finish()
        self.done.add(file)
        self.summary.bytes_out += shard.size

    def _sum_up(self) -> None:
        rows = {(layer, projection): row for file in self.errors.values() for layer, projection, *row in file}
        for weight in (w for group in self.plan.groups for w in group.weights):  # the model's order, not the shards'
            key = layer_number(weight), projection_name(weight)
            if key in rows:
                state, zeros = rows[key]
                noted = self.summary.weights[key] = Weight.from_state(state)
                self.summary.errors.add(*key, *noted.errors.sum(0).tolist())
                shape = self.checkpoint.entry(weight).shape
                self.summary.zeros += [f"{weight}: {label(shape, matrix)}".rstrip(": ") for matrix in zeros]

    def _metadata(self) -> dict[str, bytes]:
        return metadata_files(self.checkpoint.config, self.plan.quantization, self.shards)

    def _save_state(self) -> None:
        state = {"digest": self.plan.digest, "errors": self.errors, "damages": self.plan.damages}
        write_file(self.target / STATE, json.dumps(state).encode())
