"""What nvidia-modelopt's checkpoints say about themselves: tensor names, config.json, hf_quant_config.json."""

from __future__ import annotations

import json

from step_kernels.model.checkpoint import INDEX
from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import BLOCK

from .layout import FP8, NVFP4, SHARED_HEAD, SOURCE, is_expert, layer_number, parts_left

HF_QUANT_CONFIG = "hf_quant_config.json"
NAMES = ("source", "released")
# Engines take hf_quant_config.json for modelopt's by this name; the version is the one whose layout this follows.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
MIXED = "MIXED_PRECISION"
ALGORITHMS = {NVFP4: {"quant_algo": "NVFP4", "group_size": BLOCK}, FP8: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
_BITS_4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
_BITS_8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_NUMBERS = {
    "NVFP4": {"input_activations": _BITS_4, "weights": _BITS_4},
    "FP8_PER_CHANNEL_PER_TOKEN": {"input_activations": _BITS_8, "weights": _BITS_8 | {"strategy": "channel"}},
}


def released_name(name: str, config: StepConfig) -> str:
    """The NVFP4 release's name of a canonical tensor or module name; its MTP layers have no prefix."""
    if name.startswith(("vision_model", "vit_large_projector")):
        return f"model.{name}"
    layer = layer_number(name)
    if name.startswith("model.") and (layer is None or layer < config.num_layers):
        return "model.language_model." + name.removeprefix("model.")
    return name


def exclude_patterns(config: StepConfig, precisions: dict[str, str], spellings: set[str] = frozenset()) -> list[str]:
    """Patterns of the modules left alone, under the source's and the release's prefix (and any other in `spellings`).

    A layer number is always followed by a dot: engines read `layers.1*` as a substring, which takes in 10 to 19.
    `moe.gate` has no star, which would take in moe.gate_proj.
    """
    modules = ["lm_head"] * (precisions["lm_head.weight"] == SOURCE) + ["model.embed_tokens"]
    for i in range(len(config.layers)):
        for part in parts_left(config, i, precisions):
            # vLLM's draft model has most of a layer below mtp_block, and shared_head not below transformer.
            inner = ("transformer.", "") if part == "shared_head" else ("", "mtp_block.")
            inner = inner if part and part != "eh_proj" and i >= config.num_layers else ("",)
            star = "*" if part in ("", "self_attn", "share_expert", "mlp", "shared_head") else ""
            modules += [f"model.layers.{i}.{above}{part}{star}" for above in inner]
    if config.vision:
        modules += ["vision_model*", "vit_large_projector*"]
    patterns = dict.fromkeys(modules)
    patterns.update(dict.fromkeys(released_name(m, config) for m in modules))
    # The release lists its MTP layers under both prefixes, since engines add one to the whole body.
    drafts = [m for m in modules if (layer_number(m) or 0) >= config.num_layers]
    patterns.update(dict.fromkeys("model.language_model." + m.removeprefix("model.") for m in drafts))
    patterns.update(dict.fromkeys(prefix + m for prefix in sorted(spellings) for m in modules))
    return list(patterns)


def quantized_layers(config: StepConfig, weights: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """The algorithm of each quantized module, for checkpoints in several precisions.

    `weights`: canonical name -> name in the result, precision. Beside the tensors' own module names those under which
    vLLM looks for the routed experts and, in the layers that draft, for all.
    """
    found = {}
    for weight, (name, precision) in weights.items():
        module = name.removesuffix(".weight")
        names = [f"{module.rpartition('.')[0]}.experts"] if is_expert(weight) else []
        if (layer_number(weight) or 0) >= config.num_layers and not is_expert(weight):
            at = f"model.layers.{layer_number(weight)}"
            inner = weight.removeprefix(f"{at}.").removesuffix(".weight")
            names = [f"{at}.shared_head.head" if inner.startswith(SHARED_HEAD) else f"{at}.mtp_block.{inner}"]
        found |= dict.fromkeys((*names, module), ALGORITHMS[precision])
    return found


def hf_quant_config(patterns: list[str], kv_cache: str, layers: dict[str, dict] | None = None) -> dict:
    """The content of hf_quant_config.json; `layers`: of quantized_layers, where there are several precisions."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": MIXED if layers else "NVFP4",
            "kv_cache_quant_algo": "FP8" if kv_cache == "fp8" else None,
            "group_size": BLOCK,
            "exclude_modules": patterns,
            **({"quantized_layers": layers} if layers else {}),
        },
    }


def quantization_config(patterns: list[str], kv_cache: str, layers: dict[str, dict] | None = None) -> dict:
    """The same for config.json, in the form modelopt's own converter gives it."""
    targets: dict[str, list[str]] = {} if layers else {"NVFP4": ["Linear"]}
    for name, how in (layers or {}).items():
        targets.setdefault(how["quant_algo"], []).append(name)
    groups = [_NUMBERS[algorithm] | {"targets": sorted(names)} for algorithm, names in targets.items()]
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": patterns,
        "quant_algo": MIXED if layers else "NVFP4",
        **({"quantized_layers": layers} if layers else {}),
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if kv_cache == "fp8" else {}),
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def metadata_files(config: dict, quantization: dict[str, dict], shards: dict) -> dict[str, bytes]:
    """The files that describe a checkpoint, by name, in the order to write them: the index last.

    `config`: the source's config.json; its auto_map is dropped, for code is never copied. `quantization`: of the plan.
    `shards`: file -> Shard.
    """
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    if "text_config" in config:
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    config["quantization_config"] = quantization["config.json"]
    index = {
        "metadata": {"total_size": sum(shard.data_size for shard in shards.values())},
        "weight_map": {name: file for file, shard in sorted(shards.items()) for name in sorted(shard.names)},
    }
    files = {**quantization, "config.json": config, INDEX: index}
    return {name: (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode() for name, data in files.items()}
