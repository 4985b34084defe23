"""What compressed-tensors' checkpoints say about themselves in config.json; they have no other file for that."""

from __future__ import annotations

import re

from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import BLOCK

from .layout import FP8, NVFP4, SHARED_HEAD, SOURCE, engine_names, layer_number, parts_left, weight_groups

VERSION = "0.20.0"  # the one whose layout this follows
_NUMBER = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": BLOCK}
_NUMBER |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
_FP8_NUMBER = {"num_bits": 8, "type": "float", "symmetric": True}
_CACHE = _FP8_NUMBER | {"strategy": "tensor", "dynamic": False}
# No linear layers in vLLM, which finds them by these names instead of by the class.
_HEADS = [r"re:(.*\.)?lm_head$", r"re:(.*\.)?shared_head\.(head|output)$"]


def ignored(config: StepConfig, precisions: dict[str, str]) -> list[str]:
    """Patterns of the modules left alone, each an expression for the beginning of a name under whatever prefix."""
    names = [r"(.*\.)?embed_tokens$"] + [r"(.*\.)?lm_head$"] * (precisions["lm_head.weight"] == SOURCE)
    names += _below({i: parts_left(config, i, precisions) for i in range(len(config.layers))})
    names += [r"(.*\.)?vision_model\.", r"(.*\.)?vit_large_projector(\.|$)"] if config.vision else []
    return [f"re:{name}" for name in names]


def _below(layers: dict[int, tuple[str, ...]]) -> list[str]:
    """Expressions for modules of layers by number, `("",)` for all of a layer; alike layers in one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for i, parts in layers.items():
        alike.setdefault(parts, []).append(str(i))
    names = []
    for parts, numbers in alike.items():
        # Engines have some modules one deeper: moe.share_expert, mtp_block.self_attn.
        inner = "" if parts == ("",) else rf"(.*\.)?({'|'.join(map(re.escape, parts))})(\.|$)"
        names.append(rf"(.*\.)?layers\.({'|'.join(numbers)})\.{inner}")
    return names


def _targets(precisions: dict[str, str], groups: list[tuple[str, ...]], precision: str) -> list[str]:
    """Expressions for the modules of groups in a precision."""
    layers: dict[int, tuple[str, ...]] = {}
    names = []
    for group in (group for group in groups if precisions[group[0]] == precision):
        layer = layer_number(group[0])
        if layer is None:
            names.append(r"(.*\.)?lm_head$")
        elif SHARED_HEAD in group[0]:
            layers[layer] = (*layers.get(layer, ()), "shared_head.head", "shared_head.output")
        else:
            layers[layer] = (*layers.get(layer, ()), *engine_names(group))
    return [f"re:{name}" for name in (*names, *_below(layers))]


def quantization_config(config: StepConfig, precisions: dict[str, str], patterns: list[str], kv_cache: str) -> dict:
    """The quantization_config of config.json; a group in FP8 names its modules, NVFP4's takes all other linears."""
    groups = weight_groups(config)
    heads = [group for group in groups if group[0] == "lm_head.weight" or SHARED_HEAD in group[0]]
    fp8, named = _targets(precisions, groups, FP8), _targets(precisions, heads, NVFP4)
    found = {
        "group_0": {
            "targets": ["Linear", *(named if fp8 else _HEADS if named else [])],
            "weights": _NUMBER | {"dynamic": False},
            "input_activations": _NUMBER | {"dynamic": "local"},
            "format": "nvfp4-pack-quantized",
        }
    }
    if fp8:
        found["group_1"] = {
            "targets": fp8,
            "weights": _FP8_NUMBER | {"strategy": "channel", "dynamic": False},
            "input_activations": _FP8_NUMBER | {"strategy": "token", "dynamic": True},
            "format": "float-quantized",
        }
    return {
        "config_groups": found,
        "format": "mixed-precision" if fp8 else "nvfp4-pack-quantized",
        "ignore": patterns,
        "kv_cache_scheme": _CACHE if kv_cache == "fp8" else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": VERSION,
    }
