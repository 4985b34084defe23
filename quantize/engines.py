"""The modules that vLLM 0.33 and SGLang 0.5.23 build of a Step model, and which an exclude list leaves unquantized.

Each engine reads the list in its own way, against names of its own; the tests compare these rules with its code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache

from step_kernels.model.config import StepConfig

ENGINES = ("vLLM", "SGLang")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_NAMES_INSIDE_FUSED = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
_VLLM_PREFIXES = {
    "model.vision_model.": "vision_model.",
    "model.vit_large_projector.": "vit_large_projector.",
    "model.vit_large_projector": "vit_large_projector",
    "model.language_model.": "language_model.model.",
    "model.language_model": "language_model.model",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "lm_head": "language_model.lm_head",
}
_VLLM_VISION = {
    ".attn.in_proj_weight": ".attn.qkv_proj.weight",
    ".attn.in_proj_bias": ".attn.qkv_proj.bias",
    ".mlp.c_fc": ".mlp.fc1",
    ".mlp.c_proj": ".mlp.fc2",
}
_SGLANG_PREFIXES = {
    "model.vit_large_projector": "vit_large_projector",
    "model.language_model.": "language_model.model.",
    "model.vision_model": "vision_model",
}


class SplitModule(ValueError):
    """Some but not all of the weights that an engine holds in one module are excluded; the engine refuses that too."""


@dataclass(frozen=True)
class Module:
    """What an engine may build quantized: its name there, and the weights in it by canonical name."""

    name: str
    weights: tuple[str, ...]
    mtp: bool = False


def modules(engine: str, config: StepConfig) -> list[Module]:
    """All that the engine asks its exclude list about, the vision encoder aside: that is never quantized."""
    vllm, root = engine == "vLLM", "language_model." if config.vision else ""
    found = [Module(f"{root}lm_head", ("lm_head.weight",))]
    for i, layer in enumerate(config.layers):
        mtp = i >= config.num_layers
        if mtp and not vllm:
            continue  # SGLang builds these layers without quantization
        mlp = "share_expert" if layer.moe else "mlp"
        inner = f"moe.{mlp}" if vllm and layer.moe else mlp
        parts = {"self_attn.qkv_proj": [f"self_attn.{p}" for p in _FUSED["qkv_proj"]]}
        parts |= {f"self_attn.{p}": [f"self_attn.{p}"] for p in (("o_proj", "g_proj") if vllm else ("o_proj",))}
        parts |= {f"{inner}.gate_up_proj": [f"{mlp}.{p}" for p in _FUSED["gate_up_proj"]]}
        parts |= {f"{inner}.down_proj": [f"{mlp}.down_proj"]}
        if layer.moe:
            experts = "moe.experts" if vllm else "mlp.experts"
            parts[experts] = [f"moe.{p}" for p in (*_FUSED["gate_up_proj"], "down_proj")]
        at = f"model.layers.{i}"
        for name, weights in parts.items():
            name = f"{at}.mtp_block.{name}" if mtp else f"{root}{at}.{name}"
            found.append(Module(name, tuple(f"{at}.{w}.weight" for w in weights), mtp))
        if mtp:
            found.append(Module(f"{at}.shared_head.head", (f"{at}.transformer.shared_head.output.weight",), mtp))
    return found


class Excludes:
    """An exclude list as one engine reads it; `vision`: for Step-3.7's model, otherwise for Step-3.5's."""

    def __init__(self, engine: str, patterns: list[str], vision: bool):
        self.engine, self.vision, self.patterns = engine, vision, patterns
        self.mapped = (_vllm_names if engine == "vLLM" else _sglang_names)(patterns, vision)

    def leaves_out(self, module: Module) -> bool:
        """Whether the module is built unquantized. SplitModule where the engine raises."""
        if self.engine == "SGLang":
            return _sglang_excludes(module.name, self.mapped)
        if module.mtp:  # the draft model takes the list as it stands and knows of no fused modules
            return _vllm_excludes(module.name, self.patterns, {})
        return _vllm_excludes(module.name, self.mapped, _FUSED)

    def culprit(self, module: Module) -> str:
        """The first pattern of the list that leaves the module out by itself; '' where it takes several."""
        for pattern in self.patterns:
            try:
                if Excludes(self.engine, [pattern], self.vision).leaves_out(module):
                    return pattern
            except SplitModule:
                continue
        return ""


class Algorithms:
    """quantized_layers, module -> algorithm, as vLLM 0.33 reads it where quant_algo is MIXED_PRECISION."""

    def __init__(self, layers: dict[str, str], vision: bool):
        renames = (_vllm_step3p7, _vllm_step3p5) if vision else (_vllm_step3p5,)
        self.draft = self.trunk = layers
        for rename in renames:
            self.trunk = {rename(name): algorithm for name, algorithm in self.trunk.items()}

    def of(self, module: Module) -> str | None:
        """What the module is built as, None for unquantized. SplitModule where the engine raises."""
        layers, (parent, _, last) = self.draft if module.mtp else self.trunk, module.name.rpartition(".")
        spelt = [module.name, *(["lm_head"] if module.name.endswith(".lm_head") else [])]
        for name in (*spelt, *(_released(n) for n in spelt)):
            if name in layers:
                return layers[name]
        shards = {f"{at}.{shard}" for at in (parent, _released(parent)) for shard in _FUSED.get(last, ())}
        found = {layers[shard] for shard in shards if shard in layers}
        if len(found) > 1:
            raise SplitModule(module.name)
        below = [f"{at}." for at in (module.name, _released(module.name))]
        below += [f"{parent}."] if last == "experts" else []
        found = list(found) or [layers[name] for at in below for name in layers if name.startswith(at)]
        return found[0] if found else None


def _released(name: str) -> str:
    """vLLM's own name as tensors of a release have it, or the other way round."""
    ours, theirs = "language_model.model.", "model.language_model."
    if name.startswith(ours):
        return name.replace(ours, theirs, 1)
    return name.replace(theirs, ours, 1) if name.startswith(theirs) else name


def compressed_tensors_group(name: str, groups: list[dict]) -> dict:
    """The group whose targets name a module, or else the one of all linears; {} for none."""
    targets = [(group, [t for t in group.get("targets", ()) if t != "Linear"]) for group in groups]
    named = [group for group, patterns in targets if compressed_tensors_excludes(name, patterns)]
    return next(iter(named + [group for group in groups if "Linear" in group.get("targets", ())]), {})


def compressed_tensors_excludes(name: str, patterns: list[str]) -> bool:
    """compressed-tensors' rule: a pattern is the whole name, or after `re:` an expression for how it begins."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def _vllm_names(patterns: list[str], vision: bool) -> list[str]:
    """The list after each model class has renamed it, Step-3.7's and inside it Step-3.5's."""
    for rename in (_vllm_step3p7, _vllm_step3p5) if vision else (_vllm_step3p5,):
        split = []
        for p in patterns:
            # `x*` is meant for x and all below it; as `x` it then matches wherever it occurs in a name.
            starred = len(p) >= 2 and p[-1] == "*" and p[-2] != "."
            split += [p[:-1], f"{p[:-1]}.*"] if starred else [p]
        patterns = [rename(p) for p in split]
    return patterns


def _vllm_step3p7(pattern: str) -> str:
    for old, new in _VLLM_VISION.items():
        pattern = pattern.replace(old, new, 1)
    for old, new in _VLLM_PREFIXES.items():  # one after the other, each on what the last one made
        if pattern.startswith(old):
            pattern = pattern.replace(old, new, 1)
    return pattern


def _vllm_step3p5(pattern: str) -> str:
    return pattern.replace(".share_expert.", ".moe.share_expert.", 1)


def _vllm_excludes(name: str, patterns: list[str], fused: dict[str, tuple[str, ...]]) -> bool:
    last = name.rpartition(".")[2]
    if name in patterns:
        return True
    if last in fused:
        shards = [name.replace(last, shard) in patterns for shard in fused[last]]
        if any(shards) != all(shards):
            raise SplitModule(name)
        if all(shards):
            return True
    elif "experts" in name and any(name in p for p in patterns):
        return True
    return any(p in name or _glob(p)(name) for p in patterns)


def _sglang_names(patterns: list[str], vision: bool) -> list[str]:
    if not vision:
        return patterns
    names = []
    for p in patterns:
        old = next((old for old in _SGLANG_PREFIXES if p.startswith(old)), None)  # the longest first
        p = p if old is None else p.replace(old, _SGLANG_PREFIXES[old], 1)
        names += [p, p.removeprefix("language_model.")]
    return list(dict.fromkeys(names))


def _sglang_excludes(name: str, patterns: list[str]) -> bool:
    names = list(dict.fromkeys([name, name.removeprefix("language_model.")]))
    last = name.rpartition(".")[2]
    if last != "experts":  # linears: dotted paths first, fused ones by their parts
        shards = [name.replace(last, shard) for shard in _FUSED.get(last, (last,))]
        left = [any(_on_path(p, shard) for p in patterns) for shard in shards]
        if any(left) != all(left):
            raise SplitModule(name)
        if all(left):
            return True
    for pattern in patterns:
        if any(_expression(pattern)(part) for n in names for part in (n, *n.split("."))):
            return True
        tail = pattern.rpartition(".")[2]
        if tail in _NAMES_INSIDE_FUSED and tail in last:
            return True
    return False


@lru_cache(maxsize=1 << 14)  # re's own cache holds 512, a released list is longer once every engine has renamed it
def _glob(pattern: str):
    return re.compile(translate(pattern)).match


@lru_cache(maxsize=1 << 14)
def _expression(pattern: str):
    return re.compile(pattern.replace(".", r"\.").replace("*", ".*")).fullmatch


def _on_path(pattern: str, name: str) -> bool:
    """Whether the pattern, taken literally, is the name or some whole parts of it."""
    pattern, name = pattern.rstrip("."), name.rstrip(".")
    return pattern == name or name.startswith(f"{pattern}.") or f".{pattern}." in f".{name}."
