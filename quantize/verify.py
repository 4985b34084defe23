"""Checks a finished NVFP4 checkpoint, alone or against its source.

python -m quantize.verify DST --source SRC
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from step_kernels import nvfp4
from step_kernels.cli import Parser
from step_kernels.model.checkpoint import DTYPES, INDEX, Checkpoint, CheckpointError, Entry, read_json
from step_kernels.model.config import StepConfig

from .cli import print_problems
from .errors import Errors
from .layout import expert_shapes, output_tensors, projection_name, tensor_shapes, weight_groups
from .matrices import label, piece_error, pieces, read_piece
from .modelopt import HF_QUANT_CONFIG, engine_modules, is_excluded, layer_number
from .plan import FLOATS, resolve_source
from .shards import PART, read_chunks

_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
_EMBEDDING = "model.embed_tokens.weight"  # no linear layer: the release does not list it


@dataclass
class Report:
    """`problems`: a line each, none for a sound checkpoint; `errors` against the source, if one was given."""

    problems: list[str] = field(default_factory=list)
    errors: Errors = field(default_factory=Errors)


def verify(
    target: str | Path, source: str | Path | None = None, *, errors: bool = True, progress: bool = False
) -> Report:
    """Checks names, types, shapes, scales, index and metadata of folder `target`; with `source` also the copied bytes.

    `errors` measures the weights against the source too. Raises CheckpointError where a folder cannot be read at all.
    """
    checkpoint = Checkpoint(target)
    check = _Check(checkpoint, Checkpoint(resolve_source(source)) if source is not None else None)
    check.layout()
    check.index()
    check.metadata()
    total = sum(entry.end - entry.begin for entry in check.sound.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None if progress else True) as bar:
        for name, entry in check.sound.items():
            check.values(name)
            if check.source and name in check.copied:
                check.equal(name)
            elif check.source and errors and name in check.quantized:
                check.error(name)
            bar.update(entry.end - entry.begin)
    return check.report


class _Check:
    def __init__(self, checkpoint: Checkpoint, source: Checkpoint | None):
        self.checkpoint, self.source, self.report = checkpoint, source, Report()
        self.sound: dict[str, Entry] = {}  # the tensors with the right type and shape, by canonical name
        self.config = StepConfig.from_dict(checkpoint.config, str(checkpoint.folder / "config.json"))
        experts = expert_shapes(self.config)
        shapes = tensor_shapes(self.config) | experts
        # The routed experts always are; of the linears each group tells by the type of its weights.
        groups = weight_groups(self.config, "linears", lm_head=True)
        groups = [group for group in groups if any(name in experts or self.is_fp4(name) for name in group)]
        self.first = {name: group[0] for group in groups for name in group}  # with the same global scale
        self.quantized = {name: shapes[name] for name in self.first}
        self.copied = {name: shape for name, shape in shapes.items() if name not in self.first}
        quantization = checkpoint.config.get("quantization_config")
        self.quantization = quantization if isinstance(quantization, dict) else {}

    def fail(self, what: str) -> None:
        self.report.problems.append(what)

    def is_fp4(self, weight: str) -> bool:
        return weight in self.checkpoint and self.checkpoint.entry(weight).dtype == torch.uint8

    def layout(self) -> None:
        """Every tensor of the model is there, with its type and shape, and no other."""
        wanted = {name: (FLOATS, shape) for name, shape in self.copied.items()}
        for name, shape in self.quantized.items():
            outputs = output_tensors(shape).items()
            wanted |= {name + suffix: ((dtype,), s) for suffix, (dtype, s) in outputs}
            wanted[name.removesuffix("weight") + "input_scale"] = (("F32",), shape[:-2])
        if self.quantization.get("kv_cache_scheme"):
            layers = range(self.config.num_layers)
            wanted |= {f"model.layers.{i}.self_attn.{p}_proj.{p}_scale": (("F32",), ()) for i in layers for p in "kv"}
        there = {
            layer_number(name) for name in (*self.checkpoint.entries, *(self.source.entries if self.source else ()))
        }
        for name, (dtypes, shape) in wanted.items():
            layer, entry = layer_number(name), self.checkpoint.entries.get(name)
            if entry is None:
                if layer is None or layer < self.config.num_layers or layer in there:
                    self.fail(f"{name}: is missing")
            elif entry.shape != shape or _DTYPE[entry.dtype] not in dtypes:
                found = f"{_DTYPE[entry.dtype]} {list(entry.shape)}"
                self.fail(f"{entry.stored_name}: is {found}, wanted {' or '.join(dtypes)} {list(shape)}")
            else:
                self.sound[name] = entry
        for name in sorted(self.checkpoint.entries.keys() - wanted.keys()):
            self.fail(f"{self.checkpoint.entries[name].stored_name}: is no tensor of this model")

    def index(self) -> None:
        path, entries = self.checkpoint.folder / INDEX, self.checkpoint.entries.values()
        if not path.exists():
            return self.fail(f"{INDEX}: is missing")
        index = read_json(path)
        for entry in entries:
            file = index["weight_map"].get(entry.stored_name)
            if file != entry.file.name:
                self.fail(f"{INDEX}: {entry.stored_name} is in {file}, wanted {entry.file.name}")
        metadata, size = index.get("metadata"), sum(e.end - e.begin for e in entries)
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != size:
            self.fail(f"{INDEX}: total_size is {total}, wanted {size}")

    def metadata(self) -> None:
        other = read_json(self.checkpoint.folder / HF_QUANT_CONFIG).get("quantization")
        other, config = other if isinstance(other, dict) else {}, self.quantization
        if config.get("quant_method") != "modelopt" or config.get("quant_algo") != "NVFP4":
            self.fail("config.json: quantization_config is not modelopt's NVFP4")
        if other.get("quant_algo") != "NVFP4" or other.get("group_size") != nvfp4.BLOCK:
            self.fail(f"{HF_QUANT_CONFIG}: quant_algo and group_size are not NVFP4 and {nvfp4.BLOCK}")
        if bool(config.get("kv_cache_scheme")) != (other.get("kv_cache_quant_algo") == "FP8"):
            self.fail(f"{HF_QUANT_CONFIG}: kv_cache_quant_algo differs from config.json's kv_cache_scheme")
        patterns = config.get("ignore")
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            return self.fail("config.json: quantization_config.ignore is not a list of patterns")
        if patterns != other.get("exclude_modules"):
            self.fail(f"{HF_QUANT_CONFIG}: exclude_modules differs from config.json's ignore")
        for name, entry in self.checkpoint.entries.items():
            module = entry.stored_name.removesuffix("weight")[:-1]
            if name in self.quantized:
                for matched in (m for m in engine_modules(module) if is_excluded(m, patterns)):
                    self.fail(f"config.json: ignore matches {matched}, which is quantized")
            elif len(self.copied.get(name, ())) == 2 and name.endswith("weight") and name != _EMBEDDING:
                if not is_excluded(module, patterns):
                    self.fail(f"config.json: ignore does not match {module}, which is not quantized")

    def values(self, name: str) -> None:
        """No scale that is zero, negative or NaN; gate and up, and q, k and v, with one global scale."""
        kind = name.rpartition(".")[2]
        if kind == "weight_scale":
            shape = self.checkpoint.entry(name).shape
            for matrix, ranges in enumerate(pieces(shape)):
                codes = (self.checkpoint.read(name, *rows).view(torch.uint8) for rows in ranges)
                bad = sum(int(((c == 0) | (c >= 0x7F)).sum()) for c in codes)
                if bad:
                    self.fail(f"{name}: {label(shape, matrix)}{bad} block scales are zero, negative or NaN")
        elif kind.endswith("_scale") or kind == "weight_scale_2":
            shape, scale = self.checkpoint.entry(name).shape, self.checkpoint.read(name).reshape(-1)
            for i in (~(torch.isfinite(scale) & (scale > 0))).nonzero().flatten().tolist():
                self.fail(f"{name}: {label(shape, i)}is {scale[i]}, wanted a positive number")
            weight = name.removesuffix("_scale_2")
            first = self.first.get(weight, weight)
            if first != weight and f"{first}_scale_2" in self.sound:
                wanted = self.checkpoint.read(f"{first}_scale_2").reshape(-1)
                for i in (wanted != scale).nonzero().flatten().tolist():
                    whose = first.split(".")[-2]
                    self.fail(f"{name}: {label(shape, i)}is {scale[i]}, wanted {whose}'s {wanted[i]}")

    def equal(self, name: str) -> None:
        """Byte by byte as in the source."""
        ours, theirs = self.checkpoint.entry(name), self.source.entries.get(name)
        if theirs is None:
            return self.fail(f"{ours.stored_name}: is not in {self.source.folder}")
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return self.fail(f"{ours.stored_name}: type or shape differs from {self.source.folder}")
        if any(a != b for a, b in zip_longest(read_chunks(ours), read_chunks(theirs))):
            self.fail(f"{ours.stored_name}: bytes differ from {self.source.folder}")

    def error(self, name: str) -> None:
        """Adds to the error table what `name` differs by, decoded from its bytes."""
        entry, shape = self.source.entries.get(name), self.quantized[name]
        if entry is None or entry.shape != shape:
            return self.fail(f"{name}: is not in {self.source.folder} as {list(shape)}")
        if not self.sound.keys() >= {f"{name}_scale", f"{name}_scale_2"}:
            return
        for scale, ranges in zip(self.checkpoint.read(f"{name}_scale_2").reshape(-1), pieces(shape)):
            for begin, end in ranges:
                weight, _ = read_piece(self.source, name, begin, end)
                codes, blocks = (self.checkpoint.read(n, begin, end).flatten(0, -2) for n in (name, f"{name}_scale"))
                sums = piece_error(weight, codes, blocks, scale)
                self.report.errors.add(layer_number(name), projection_name(name), *sums.tolist())


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = Parser(
        prog="python -m quantize.verify",
        description="Checks an NVFP4 checkpoint: names, types, shapes, scales, index and metadata.",
        epilog="example: python -m quantize.verify Step-3.7-Flash-NVFP4 --source Step-3.7-Flash",
    )
    parser.add_argument("target", metavar="DST", help="folder of the NVFP4 checkpoint")
    parser.add_argument(
        "--source",
        metavar="SRC",
        help="folder it was made from (or the word bundled): compares the tensors left alone byte by byte and "
        "prints how far the quantized ones are off",
    )
    options = parser.parse_args(arguments)
    try:
        report = verify(options.target, options.source, progress=True)
        parts = sorted(f.name for f in Path(options.target).glob("*" + PART))
    except CheckpointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    report.problems += [f"{part}: a file half written; finish the conversion with --resume" for part in parts]
    if report.errors.sums:
        print(report.errors.table())
    print_problems(report.problems)
    if not report.problems:
        print(f"{options.target}: verified")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
