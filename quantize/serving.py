"""What engines make of a checkpoint: what its exclude list leaves out, its config files, names and announced layers."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from step_kernels.model.checkpoint import canonical
from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import BLOCK

from .checks import State, both_configs, config_groups
from .engines import (
    ENGINES,
    Algorithms,
    Excludes,
    SplitModule,
    compressed_tensors_excludes,
    compressed_tensors_group,
    modules,
)
from .layout import FP8, NVFP4, layer_number
from .modelopt import ALGORITHMS, HF_QUANT_CONFIG, MIXED

_EMBEDDING = "model.embed_tokens.weight"  # no linear layer: nobody asks the exclude list about it
_VLLM_LISTS = ("layer_types", "rope_theta", "partial_rotary_factors")
_LAYER_LISTS = (*_VLLM_LISTS, "swiglu_limits", "swiglu_limits_shared")
_NVFP4, _FP8 = (ALGORITHMS[precision]["quant_algo"] for precision in (NVFP4, FP8))
_HELD = {(True, False): _NVFP4, (False, True): _FP8, (False, False): ""}  # of a weight in NVFP4, in FP8, in neither
_MTP = "answers come without it; vLLM and SGLang fail when asked for speculative decoding by MTP"


def excludes(state: State) -> None:
    """(d) What the exclude list leaves unquantized in vLLM and SGLang is what the files hold unquantized."""
    found, model, patterns = state.findings, state.model, state.claims.patterns
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        return found.fail("d", "is no list of patterns", "exclude list", repr(patterns)[:40])
    if model.compressed:
        return _compressed_excludes(state, patterns)
    counts, culprits, mixed = [], [], state.claims.algorithm == MIXED
    algorithms = Algorithms(state.claims.layers, model.config.vision is not None)
    for engine in ENGINES[: 1 if mixed else None]:  # vLLM alone reads FP8 by rows
        rules, asked = Excludes(engine, patterns, model.config.vision is not None), modules(engine, model.config)
        asked = [m for m in asked if all(w in model.quantized or w in state.contents for w in m.weights)]
        counts.append(f"{len(asked)} modules of {engine}")
        for module in asked:
            quantized = {w in model.quantized for w in module.weights}
            held = {_HELD[w in model.quantized, w in model.channels] for w in module.weights}
            try:
                left_out = rules.leaves_out(module)
                built = algorithms.of(module) if mixed else _NVFP4
            except SplitModule:
                what = "some but not all of its weights are excluded" + ", or of one algorithm" * mixed
                found.fail("d", what, module.name, effect=f"{engine} stops")
                continue
            except re.error:
                found.fail("d", "holds a pattern that is no expression", "exclude list", effect=f"{engine} stops")
                break
            if left_out and held != {""}:
                culprits.append(rules.culprit(module))
                effect = f"{engine} builds it in BF16 and cannot load it"
                what = f"is excluded, but {'NVFP4' if True in quantized else 'FP8'} in the files"
                found.fail("d", what, module.name, f"by {culprits[-1]}", effect)
            elif mixed and not left_out and held != {built or ""}:
                what = f"is {built or 'nothing'} by quantized_layers, but {' and '.join(sorted(held))} in the files"
                found.fail("d", what, module.name, effect=f"{engine} builds it so and cannot load it")
            elif not mixed and not left_out and False in quantized:
                effect = f"{engine} builds it in NVFP4 and finds no scales: it stops at load"
                found.fail("d", "is not excluded, but not in NVFP4 in the files", module.name, effect=effect)
    found.done["d"] = f"{len(patterns)} patterns on {' and '.join(counts)}"
    experts = [w.removesuffix(".weight") for w in model.quantized if ".moe." in w]
    for pattern in (p for p in patterns if p not in culprits):
        taken = [name for name in experts if fnmatchcase(name, canonical(pattern))]
        if taken:
            effect = "harmless in vLLM and SGLang, whose name is another; what goes by tensor names leaves it in BF16"
            found.note("d", "matches experts' own names as a glob", pattern, min(taken), effect)


def _compressed_excludes(state: State, patterns: list[str]) -> None:
    found, model = state.findings, state.model
    groups = config_groups(both_configs(state.contents)[0])
    held = model.quantized | model.channels
    names = {w.removesuffix(".weight"): w for w in (*held, *model.left) if w != _EMBEDDING}
    for canonical_name, weight in names.items():
        stems = [s.names[0].rpartition(".")[0] for s in held.get(weight, [])]
        precision, bits = ("NVFP4", 4) if weight in model.quantized else ("FP8", 8)
        for stem in stems:
            if compressed_tensors_excludes(stem, patterns):
                found.fail("d", f"is excluded, but {precision} in the files", stem)
            elif ((compressed_tensors_group(stem, groups).get("weights")) or {}).get("num_bits", bits) != bits:
                found.fail("d", f"is in a config group of other bits, but {precision} in the files", stem)
        entry = state.sound.get(weight)
        if not stems and entry is not None and len(entry.shape) == 2 and weight.endswith(".weight"):
            spelt = {canonical_name, entry.stored_name.removesuffix(".weight")}
            if not any(compressed_tensors_excludes(s, patterns) for s in spelt) and "vision" not in weight:
                found.fail("d", "is not excluded, but not in NVFP4 in the files", min(spelt))
    found.done["d"] = f"{len(patterns)} patterns by compressed-tensors' rule on the tensors' own names"


def loaders(state: State) -> None:
    """(g) Config files that name this format, names that engines' loaders map, and what they cannot serve."""
    found, model, claims = state.findings, state.model, state.claims
    config, other = both_configs(state.contents)
    wanted = "compressed-tensors" if model.compressed else "modelopt"
    if not config and not other:
        found.fail("g", f"neither it nor {HF_QUANT_CONFIG} says how the weights are quantized", "config.json",
                   effect="engines take the codes for weights and stop")  # fmt: skip
    elif claims.method != wanted and not (not model.compressed and str(claims.method).startswith("modelopt")):
        what = f"quant_method is {claims.method}, but the tensors are those of {wanted}"
        found.fail("g", what, "config.json", effect="engines look for tensors of other names and skip these")
    elif model.compressed:
        form = "mixed-precision" if model.channels else "nvfp4-pack-quantized"
        if config.get("format") != form:
            found.fail("g", f"format is {config.get('format')}, wanted {form}", "config.json")
    else:
        _modelopt_configs(state, config, other)
    if model.channels and not model.compressed:
        where = min(model.channels).removesuffix(".weight")
        effect = "vLLM 0.33 loads that; 0.25 takes the codes for weights without a word, and SGLang 0.5.23 builds "
        effect += "these linears and the experts in BF16"
        found.note("g", "linears are in FP8, a scale a row", where, f"and {len(model.channels) - 1} more", effect)
    if model.per_expert or model.compressed:
        layout = "experts one by one" if model.per_expert else "stacked experts of compressed-tensors"
        found.note("g", f"stores {layout}", state.contents.folder.name,
                   effect="vLLM loads that; SGLang stops, transformers leaves experts at random")  # fmt: skip
    for name, entry in state.contents.entries.items():
        if not is_loadable(entry.stored_name, name, model.config):
            found.fail("g", "is spelt as no engine spells it", entry.stored_name, effect="vLLM skips it without a word")
    _mtp(state)
    found.done["g"] = f"config files, names; layout: {wanted}, {'per expert' if model.per_expert else 'stacked'}"


def _modelopt_configs(state: State, config: dict, other: dict) -> None:
    found = state.findings
    if not config:
        effect = f"vLLM and SGLang then read {HF_QUANT_CONFIG}, transformers takes the codes for weights"
        found.note("g", "has no quantization_config", "config.json", effect=effect)
    if not other:
        why = state.contents.hf_quant_fault or "has no quantization"
        found.note("g", why, HF_QUANT_CONFIG, effect="vLLM and SGLang read config.json; TensorRT-LLM wants this file")
    for file, part in (("config.json", config), (HF_QUANT_CONFIG, other)):
        if not part:
            continue
        wanted = (MIXED,) if state.model.channels else ("NVFP4", "W4A16_NVFP4")
        if str(part.get("quant_algo")).upper() not in wanted:
            found.fail("g", f"quant_algo is {part.get('quant_algo')}, wanted {' or '.join(wanted)}", file)
        for size in _group_sizes(part) - {BLOCK}:
            found.fail("g", f"group_size is {size}, wanted {BLOCK}", file)
    missing = [k for k in ("group_size", "kv_cache_quant_algo", "exclude_modules") if other and k not in other]
    if missing:
        found.fail("g", f"lacks {', '.join(missing)}", HF_QUANT_CONFIG, effect="vLLM stops where it reads this file")
    if config and other:
        pairs = {
            "exclude_modules": (config.get("ignore", config.get("exclude_modules")), other.get("exclude_modules")),
            "kv_cache_quant_algo": (bool(config.get("kv_cache_scheme")), other.get("kv_cache_quant_algo") == "FP8"),
            "quant_algo": (config.get("quant_algo"), other.get("quant_algo")),
            "quantized_layers": (config.get("quantized_layers"), other.get("quantized_layers")),
        }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                found.fail("g", f"{name} differs from config.json's", HF_QUANT_CONFIG,
                           effect="vLLM and SGLang go by config.json, TensorRT-LLM by this file")  # fmt: skip
    if state.claims.weights_only and state.claims.algorithm == "NVFP4":
        found.note("g", "quant_algo is NVFP4 with weights alone in NVFP4", "config.json",
                   effect="vLLM 0.33 takes it for W4A16_NVFP4; others look for input scales")  # fmt: skip


def _group_sizes(config: dict) -> set:
    """The block sizes that a quantization config names."""
    groups = config_groups(config)
    parts = [config, *groups, *(p for g in groups for p in g.values() if isinstance(p, dict))]
    sizes = (part.get("group_size") for part in parts)
    return {size if isinstance(size, int) else repr(size) for size in sizes if size is not None}


def is_loadable(stored: str, name: str, config: StepConfig) -> bool:
    """Whether vLLM and SGLang map the stored name to the parameter that the canonical one stands for."""
    if not name.startswith(("model.", "lm_head.", "vision_model.", "vit_large_projector.")):
        return True  # no tensor of the model, which check (a) says
    if name.startswith("lm_head."):
        return stored == name or (config.vision is not None and stored == f"language_model.{name}")
    layer = layer_number(name)
    if layer is not None and layer >= config.num_layers:
        return stored == name  # the draft model's loader strips no prefix
    if stored == name or (name.startswith("vi") and stored == f"model.{name}"):
        return True
    return config.vision is not None and stored.startswith(("model.language_model.", "language_model.model."))


def _mtp(state: State) -> None:
    """MTP layers and per-layer lists that config.json announces; as in the source they are no fault of the files."""
    model, found, source = state.model, state.findings, state.source
    theirs = {layer_number(name) for name in source.entries} if source else set()
    if model.missing_mtp:
        tell = found.note if source and not theirs & set(model.missing_mtp) else found.fail
        layers = f"model.layers.{model.missing_mtp[0]}" + (f"-{model.missing_mtp[-1]}" * (len(model.missing_mtp) > 1))
        tell("g", "MTP layers that config.json announces have no tensors", layers, effect=_MTP)
    drafts = [w for w in model.quantized if ".moe." not in w and (layer_number(w) or 0) >= model.config.num_layers]
    if drafts:
        found.note("g", "MTP layers are in NVFP4", drafts[0].removesuffix(".weight"), f"and {len(drafts) - 1} more",
                   "vLLM drafts with them; SGLang builds them in BF16 and stops when asked for MTP")  # fmt: skip
    text = state.contents.config.get("text_config", state.contents.config)
    given = source.config.get("text_config", source.config) if source else {}
    for name in _LAYER_LISTS:
        values = text.get(name)
        more = text.get("mtp_layer_types") if name == "layer_types" else None
        extra = len(more) if isinstance(more, list) else 0
        if isinstance(values, list) and len(values) + extra < len(model.config.layers):
            same = isinstance(given, dict) and given.get(name) == values
            tell = found.note if same else found.fail
            count = f"{len(values)} entries for {len(model.config.layers)} layers, MTP included"
            who = "vLLM and SGLang look" if name in _VLLM_LISTS else "SGLang looks"
            effect = f"{who} up the MTP layers' entries: IndexError when MTP is asked for"
            tell("g", f"list has {count}", name, effect=effect)
