"""What a checkpoint must hold: the model's tensors, an index of them, the source's bytes where it was left alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels.model.checkpoint import INDEX, Checkpoint, Entry, canonical, pieces, read_piece

from .contents import DTYPE, Contents, Model
from .findings import Findings, size
from .formats import INPUT_SCALE
from .layout import layer_number
from .plan import FLOATS

CHUNK = 16 << 20  # bytes read at a time
_UNLOADED = "vLLM looks for no gaps in a quantized model: uninitialised memory, NaN or empty answers"


@dataclass
class Claims:
    """What config.json and hf_quant_config.json say of the quantization, the first where both do. `layers`: module ->
    algorithm, where there are several."""

    method: str | None
    algorithm: str | None
    patterns: list | None
    layers: dict[str, str]
    cache: bool
    weights_only: bool

    @classmethod
    def read(cls, contents: Contents) -> Claims:
        """Of both files, as engines read them; nothing is checked here."""
        config, other = both_configs(contents)
        groups = config_groups(config)
        bare = bool(groups) and all(g.get("input_activations") is None for g in groups)
        algorithm = config.get("quant_algo") or other.get("quant_algo")
        lists = (config.get("ignore"), config.get("exclude_modules"), other.get("exclude_modules"))
        method = config.get("quant_method") if config else "modelopt" if other else None
        layers = next((p["quantized_layers"] for p in (config, other) if "quantized_layers" in p), None)
        layers = layers if isinstance(layers, dict) else {}
        named = {name: str(how.get("quant_algo")).upper() for name, how in layers.items() if isinstance(how, dict)}
        return cls(
            method=method,
            algorithm=str(algorithm).upper() if algorithm else None,
            patterns=next((p for p in lists if p is not None), None),
            layers=named,
            cache=bool(config.get("kv_cache_scheme") or other.get("kv_cache_quant_algo")),
            weights_only=bare or str(algorithm).upper() == "W4A16_NVFP4",
        )


def both_configs(contents: Contents) -> tuple[dict, dict]:
    """quantization_config of config.json, and `quantization` of hf_quant_config.json; {} for none."""
    text = contents.config.get("text_config")
    config = contents.config.get("quantization_config") or (text or {}).get("quantization_config")
    parts = config, contents.hf_quant_config.get("quantization")
    return tuple(part if isinstance(part, dict) else {} for part in parts)


def config_groups(config: dict) -> list[dict]:
    """The groups of a quantization_config, each with `weights` and `input_activations`."""
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


@dataclass
class State:
    """What the checks share. `sound`: the tensors with the right type and shape, by canonical name."""

    contents: Contents
    model: Model
    claims: Claims
    source: Checkpoint | None
    findings: Findings = field(default_factory=Findings)
    sound: dict[str, Entry] = field(default_factory=dict)


def headers(state: State) -> None:
    """(a) Every tensor of the model with its type and shape, and no other; an index with all of them."""
    contents, model, found = state.contents, state.model, state.findings
    for file, fault in contents.faults:
        found.fail("a", fault, file)
    for part in sorted(f.name for f in contents.folder.glob("*.part")):
        found.fail("a", "a file half written", part, effect="finish the conversion with --resume")
    wanted = {
        name: (FLOATS, [shape]) for name, shape in model.left.items() if layer_number(name) not in model.missing_mtp
    }
    inputs = set()
    for stored in (s for parts in model.quantized.values() for s in parts):
        wanted |= {name: ((dtype,), shapes) for name, (dtype, shapes) in stored.tensors.items()}
        inputs.add(stored.names[INPUT_SCALE])
    for stored in (s for parts in model.channels.values() for s in parts):
        (codes, shapes), (scales, rows) = stored.tensors.values()
        wanted |= dict(zip(stored.names, [((codes,), shapes), ((scales, "BF16"), rows)]))
    layers = [f"model.layers.{i}.self_attn." for i in range(len(model.config.layers))]
    optional = {f"{layer}{part}{p}_scale" for layer in layers for p in "kv" for part in (f"{p}_proj.", "")}
    for name, (dtypes, shapes) in wanted.items():
        entry = contents.entries.get(name)
        if entry is not None:
            _sound(state, name, entry, dtypes, shapes)
        elif name not in inputs or not state.claims.weights_only:
            sglang = "" if name.startswith("vi") else "; SGLang stops"  # it looks for gaps in the text model alone
            found.fail("a", "is missing", name, effect=_UNLOADED + sglang)
    for name in sorted(contents.entries.keys() - wanted.keys()):
        entry = contents.entries[name]
        if name in optional:
            _sound(state, name, entry, ("F32", "BF16"), [(), (1,)])
        else:
            found.fail("a", "is no tensor of this model", entry.stored_name, effect="engines skip it without a word")
    _index(state)
    found.done["a"] = (
        f"{len(contents.entries)} tensors, {size(contents.size)} in {len(contents.files)} files, and index"
    )


def _sound(state: State, name: str, entry: Entry, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    if entry.shape in shapes and DTYPE[entry.dtype] in dtypes:
        state.sound[name] = entry
    else:
        what = f"is {DTYPE[entry.dtype]} {list(entry.shape)}, wanted {' or '.join(dtypes)} {list(shapes[0])}"
        state.findings.fail("a", what, entry.stored_name)


def _index(state: State) -> None:
    contents, found = state.contents, state.findings
    if contents.index_fault:
        if len(contents.files) > 1:
            found.fail("a", contents.index_fault, INDEX)
        return
    listed = contents.index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        return found.fail("a", "weight_map is missing or not a map of names", INDEX)
    files = {f.name for f in contents.files}
    for file in sorted(set(listed.values()) - files):
        count = sum(f == file for f in listed.values())
        found.fail("a", f"not found, but {INDEX} lists it", file, f"{count} tensors")
    unread = {file for file, _ in contents.faults}
    for name, file in listed.items():
        if file in files - unread and canonical(name) not in contents.entries:
            found.fail("a", f"is missing, but {INDEX} lists it", name)
    for entry in contents.entries.values():
        if entry.stored_name not in listed:
            found.fail("a", f"is not in {INDEX}", entry.stored_name, entry.file.name, "loaders that go by it miss it")
        elif listed[entry.stored_name] != entry.file.name:
            found.fail("a", f"is in another file than {INDEX} says", entry.stored_name, entry.file.name)
    metadata = contents.index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != contents.size and not contents.faults:
        found.fail("a", f"total_size is {total}, wanted {contents.size}", INDEX)


def copies(state: State, quick: bool, bar: tqdm) -> None:
    """(c) What is not quantized has the source's bytes; with `quick` a few places of each tensor are compared."""
    found, source, bytes_read = state.findings, state.source, 0
    if not state.model.quantized:
        found.fail("c", "holds no weight in NVFP4", state.contents.folder.name)
    if source is None:
        found.skipped["c"] = "no --source to compare with"
        return
    for name in state.model.left:
        ours, theirs = state.sound.get(name), source.entries.get(name)
        if ours is None:
            continue
        if theirs is None:
            found.fail("c", "is not in the source", ours.stored_name)
        elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            found.fail("c", "type or shape differs from the source's", ours.stored_name)
        else:
            for a, b in zip(*(places(entry, quick) for entry in (ours, theirs))):
                bytes_read += a.end - a.begin
                bar.update(a.end - a.begin)
                if not _equal(read_piece(a), read_piece(b)):
                    found.fail("c", "bytes differ from the source's", ours.stored_name)
                    break
    found.done["c"] = f"{'samples' if quick else 'all'} of what is not quantized, {size(bytes_read)}"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Of bytes; eight at a time, which is eight times as fast."""
    whole = len(a) // 8 * 8
    parts = [(t[:whole].view(torch.int64), t[whole:]) for t in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*parts))


def places(entry: Entry, quick: bool, most: int = 1 << 18) -> list:
    """The pieces of a tensor to read: all, or four spread evenly from its first byte to its last."""
    if not quick or entry.end - entry.begin <= most:
        return pieces(entry, CHUNK)
    parts = pieces(entry, most // 4)
    return [parts[i * (len(parts) - 1) // 3] for i in range(4)]
