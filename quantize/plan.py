"""What becomes of every tensor: quantized, copied or consumed. Decided from headers alone, before any data is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

import step_kernels.model
from step_kernels.model.checkpoint import DTYPES, Checkpoint, CheckpointError, Entry
from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import BLOCK, SEARCHES

from . import compressed
from .calibration import read_tokens
from .formats import COMPRESSED, FORMATS, INPUT_SCALE, Channels, Stored, stored
from .layout import (
    FP8,
    NVFP4,
    PRECISIONS,
    SOURCE,
    expert_shapes,
    inverse_scale_shape,
    is_expert,
    layer_number,
    projection_name,
    recipe_precisions,
    tensor_shapes,
    weight_groups,
)
from .modelopt import (
    HF_QUANT_CONFIG,
    NAMES,
    exclude_patterns,
    hf_quant_config,
    quantization_config,
    quantized_layers,
    released_name,
)

BUNDLED = "bundled"
RECIPES = ("experts", "linears", "mixed")
REST = (SOURCE, FP8)
KV_CACHES, KV_SCALES = ("fp8", "none"), ("cast", "calibrated")
CALIBRATED = ("hessian", "gptq")  # searches that need to know the inputs of a weight
NVFP4_BITS = 4 + 8 / BLOCK  # a weight, its block's scale included
FLOATS = ("BF16", "F16", "F32")
_NAME = {dtype: name for name, dtype in DTYPES.items()}


class UsageError(Exception):
    """A request that cannot be meant; the command line exits with 2."""


@dataclass(frozen=True)
class Settings:
    """What changes the bytes of the result."""

    recipe: str = "experts"
    search: str = "mse"
    kv_cache: str = "fp8"
    names: str = "source"
    lm_head: bool = False
    calibration: str | Path | None = None  # text or token ids, as calibration.read_tokens takes them
    kv_scales: str = "cast"
    format: str = FORMATS[0]
    mtp: bool = False
    rest: str = SOURCE
    bits: float | None = None  # a weight of the routed experts and the linears that may be quantized

    def __post_init__(self):
        searches = (*SEARCHES, *CALIBRATED)
        choices = {"recipe": RECIPES, "search": searches, "kv_cache": KV_CACHES, "names": NAMES, "kv_scales": KV_SCALES}
        choices |= {"format": FORMATS, "rest": REST}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")
        if self.rest == FP8 and self.recipe != "experts":
            raise UsageError(
                f"rest: got fp8 with recipe {self.recipe}, which leaves nothing to it, wanted recipe experts"
            )
        if self.lm_head and self.recipe == "experts" and self.rest == SOURCE:
            raise UsageError("lm_head: got it with recipe experts, wanted recipe linears or mixed, or rest fp8")
        if (self.bits is None) == (self.recipe == "mixed"):
            raise UsageError(
                f"bits: got {self.bits} with recipe {self.recipe}, wanted a number with recipe mixed alone"
            )
        if self.bits is not None and not self.bits >= NVFP4_BITS:
            raise UsageError(f"bits: got {self.bits}, wanted at least {NVFP4_BITS}, what all linears in NVFP4 have")
        if self.calibration is None and self.recipe == "mixed":
            raise UsageError("recipe: mixed measures what precisions cost, wanted calibration data")
        if self.calibration is None and self.search in CALIBRATED:
            raise UsageError(f"search: {self.search} needs to know the weights' inputs, wanted calibration data")
        if self.kv_scales == "calibrated" and (self.calibration is None or self.kv_cache == "none"):
            raise UsageError("kv_scales: got calibrated, wanted calibration data and an fp8 KV cache with it")

    @property
    def plain_search(self) -> str:
        """The search for weights whose inputs are not calibrated."""
        return "mse" if self.search in CALIBRATED else self.search


@dataclass(frozen=True)
class Group:
    """Weights of one precision, in NVFP4 with one global scale (an expert). `weights`: canonical names; `outputs`:
    shard, name."""

    weights: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    precision: str = NVFP4


@dataclass(frozen=True)
class Constant:
    """A scale of activations or of the KV cache: 1.0, or what calibration found for `what` in the layer.

    `inverse`: stored as 1 / scale.
    """

    file: str
    name: str
    layer: int | None
    what: str
    inverse: bool = False


@dataclass
class Plan:
    """`precisions`: of each of layout.weight_groups, by its first weight; `shards`: file -> tensor -> (dtype, shape);
    `copies`: entry, file, name."""

    checkpoint: Checkpoint
    config: StepConfig
    settings: Settings
    precisions: dict[str, str]
    patterns: list[str]
    tokens: Tensor | None = None  # i64 [sequences, length], to calibrate with
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    copies: list[tuple[Entry, str, str]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    damages: dict[str, dict[str, float]] = field(default_factory=dict)  # of precisions, as sensitivity.measure gives

    @property
    def digest(self) -> str:
        """Names this conversion: the same settings, source headers, source config and version of the code."""
        entries = [(e.stored_name, e.file.name, _NAME[e.dtype], e.shape, e.begin) for e in self._entries()]
        seen = None if self.tokens is None else hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        settings = asdict(self.settings) | {"calibration": seen}
        what = [step_kernels.__version__, settings, self.precisions, entries, self.checkpoint.config]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def is_by_recipe(self) -> bool:
        """Whether every precision is the recipe's."""
        s = self.settings
        return self.precisions == recipe_precisions(self.config, s.recipe, s.rest, s.lm_head, s.mtp)

    @property
    def metadata(self) -> dict[str, str]:
        """What each shard's header says of itself."""
        made = {"producer": f"step-kernels {step_kernels.__version__}", "search": self.settings.search}
        return {"format": "pt", **made, "conversion": self.digest}

    @property
    def quantization(self) -> dict[str, dict]:
        """What the config files say of the result: file -> quantization, hf_quant_config.json only of modelopt's."""
        cache = self.settings.kv_cache
        if self.settings.format == COMPRESSED:
            found = compressed.quantization_config(self.config, self.precisions, self.patterns, cache)
            return {"config.json": found}
        layers = None
        if FP8 in self.precisions.values():
            held = {w: (name, g.precision) for g in self.groups for w, (_, name) in zip(g.weights, g.outputs)}
            layers = quantized_layers(self.config, held)
        return {
            HF_QUANT_CONFIG: hf_quant_config(self.patterns, cache, layers),
            "config.json": quantization_config(self.patterns, cache, layers),
        }

    def stored(self, weight: str, name: str, precision: str) -> list[Stored] | list[Channels]:
        """How the result holds a quantized weight of that canonical name and name in the result."""
        form = self.settings.format
        return stored(weight, name, self.checkpoint.entry(weight).shape, form, form == COMPRESSED, precision)

    def _entries(self) -> list[Entry]:
        return sorted(self.checkpoint.entries.values(), key=lambda e: (e.file.name, e.begin, e.stored_name))

    def add(self, file: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.shards.setdefault(file, {})[name] = (dtype, shape)


def resolve_source(source: str | Path) -> Path:
    """The folder of a checkpoint; the word `bundled` is the one that comes with step_kernels."""
    return Path(step_kernels.model.__file__).parent / "bundled" if str(source) == BUNDLED else Path(source)


def make_plan(checkpoint: Checkpoint, settings: Settings, precisions: dict[str, str] | None = None) -> Plan:
    """The plan for an opened checkpoint; each of its tensors must match a rule and none of the model's may be missing.

    `precisions`: first weight of a group -> nvfp4, fp8 or source, in place of what the recipe says; none of routed
    experts. An output shard holds what the tensors of the source shard of that name become.
    """
    method = _quant_method(checkpoint.config)
    if method not in (None, "fp8"):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: quantization_config says {method}: the source is already quantized, "
            f"wanted a BF16 or FP8 checkpoint"
        )
    config = StepConfig.from_dict(checkpoint.config, str(checkpoint.folder / "config.json"))
    for name, size in (("hidden_size", config.hidden_size), ("moe_intermediate_size", config.moe_intermediate_size)):
        if size % BLOCK:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: {name} is {size}, wanted a multiple of {BLOCK}"
            )
    if not any(layer.moe for layer in config.layers):
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: moe_layers_enum names no layer to quantize")
    stored = [entry.stored_name for entry in checkpoint.entries.values()]
    third = {"language_model."} if any(name.startswith("language_model.") for name in stored) else set()
    if settings.names == "released" and config.vision is None:
        raise UsageError(
            f"names: got released, but {checkpoint.folder} is a model of text alone, whose tensors no engine finds "
            f"under model.language_model.*, wanted source"
        )
    chosen = recipe_precisions(config, settings.recipe, settings.rest, settings.lm_head, settings.mtp)
    for leader, precision in (precisions or {}).items():
        if leader not in chosen or is_expert(leader) or precision not in PRECISIONS:
            wanted = f"the first weight of a group of linears as one of {', '.join(PRECISIONS)}"
            raise UsageError(f"precisions: got {leader} as {precision}, wanted {wanted}")
    chosen |= precisions or {}
    if settings.format == COMPRESSED:
        patterns = compressed.ignored(config, chosen)
    else:
        patterns = exclude_patterns(config, chosen, third)
    plan = Plan(checkpoint, config, settings, chosen, patterns)
    if settings.calibration is not None:
        plan.tokens = read_tokens(settings.calibration, checkpoint.folder, config)
    shapes = tensor_shapes(config) | expert_shapes(config)
    groups = [group for group in weight_groups(config) if chosen[group[0]] != SOURCE]
    quantized = {name for group in groups for name in group}
    _check_names(checkpoint, config, shapes, quantized)
    for name in shapes:
        if name in checkpoint and name not in quantized:
            _copy(plan, name, shapes[name])
    for group in groups:
        _quantize(plan, group, shapes)
    return plan


def _quant_method(config: dict) -> str | None:
    for part in (config, config.get("text_config") or {}):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            return method if isinstance(method, str) else "an unknown method"
    return None


def _check_names(checkpoint: Checkpoint, config: StepConfig, shapes: dict, quantized: set[str]) -> None:
    for name, entry in checkpoint.entries.items():
        weight = name.removesuffix("_scale_inv")
        if not (name in shapes or (weight != name and weight in quantized)):
            raise CheckpointError(f"{entry.file}: {entry.stored_name}: no rule says what becomes of this tensor")
    # A checkpoint may come without its MTP layers (the first NVFP4 upload did), but not with half of one.
    there = {layer_number(name) for name in checkpoint.entries}
    for name in shapes:
        layer = layer_number(name)
        if layer is None or layer < config.num_layers or layer in there:
            checkpoint.entry(name)


def _copy(plan: Plan, name: str, shape: tuple[int, ...]) -> None:
    entry = plan.checkpoint.entry(name)
    _expect(entry, shape, FLOATS)
    output = _output_name(plan, name, entry)
    plan.copies.append((entry, entry.file.name, output))
    plan.add(entry.file.name, output, _NAME[entry.dtype], shape)
    _cache_scale(plan, name, entry.file.name, output)


def _cache_scale(plan: Plan, name: str, file: str, output: str) -> None:
    """The scale of the KV cache beside k_proj and v_proj."""
    for projection in ("k", "v"):
        layer, suffix = layer_number(name), f"self_attn.{projection}_proj.weight"
        if plan.settings.kv_cache == "fp8" and name.endswith(suffix) and layer < plan.config.num_layers:
            scale = output.removesuffix("weight") + f"{projection}_scale"
            plan.add(file, scale, "F32", ())
            plan.constants.append(Constant(file, scale, layer, f"{projection}_scale"))


def _quantize(plan: Plan, weights: tuple[str, ...], shapes: dict) -> None:
    outputs, precision = [], plan.precisions[weights[0]]
    for name in weights:
        entry, shape = plan.checkpoint.entry(name), shapes[name]
        _expect(entry, shape, (*FLOATS, "F8_E4M3"))
        if precision == NVFP4 and shape[-1] % BLOCK:
            raise CheckpointError(
                f"{entry.file}: {entry.stored_name}: rows of {shape[-1]}, wanted a multiple of {BLOCK}"
            )
        inverse = f"{name}_scale_inv"
        if _NAME[entry.dtype] == "F8_E4M3":
            _expect(plan.checkpoint.entry(inverse), inverse_scale_shape(shape), ("F32",))
        elif inverse in plan.checkpoint:
            raise CheckpointError(f"{name}: is {_NAME[entry.dtype]}, but {inverse} is there, wanted F8_E4M3 with it")
        file, output = entry.file.name, _output_name(plan, name, entry)
        for held in plan.stored(name, output, precision):
            for part, (tensor, (dtype, allowed)) in enumerate(held.tensors.items()):
                plan.add(file, tensor, dtype, allowed[0])
                if part == INPUT_SCALE:  # NVFP4's; 1.0 without calibration data: activations keep their own magnitude
                    what = f"{projection_name(name)}.input_scale"
                    plan.constants.append(Constant(file, tensor, layer_number(name), what, held.inverse))
        _cache_scale(plan, name, file, output)
        outputs.append((file, output))
    plan.groups.append(Group(weights, tuple(outputs), precision))


def _output_name(plan: Plan, name: str, entry: Entry) -> str:
    return entry.stored_name if plan.settings.names == "source" else released_name(name, plan.config)


def _expect(entry: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: {entry.stored_name}: shape {list(entry.shape)}, wanted {list(shape)} (by config.json)"
        )
    if _NAME[entry.dtype] not in dtypes:
        raise CheckpointError(
            f"{entry.file}: {entry.stored_name}: dtype {_NAME[entry.dtype]}, wanted {' or '.join(dtypes)}"
        )
