"""What compressed-tensors' checkpoints say about themselves in config.json; they have no other file for that."""

from __future__ import annotations

import re

from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import BLOCK

from .layout import parts_left

VERSION = "0.20.0"  # the one whose layout this follows
_NUMBER = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": BLOCK}
_NUMBER |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
# No linear layers in vLLM, which finds them by these names instead of by the class.
_HEADS = [r"re:(.*\.)?lm_head$", r"re:(.*\.)?shared_head\.(head|output)$"]


def ignored(config: StepConfig, recipe: str, lm_head: bool, mtp: bool) -> list[str]:
    """Patterns of the modules left alone, each an expression for the beginning of a name under whatever prefix."""
    names = [r"(.*\.)?embed_tokens$"] if lm_head else [r"(.*\.)?embed_tokens$", r"(.*\.)?lm_head$"]
    layers: dict[tuple[str, ...], list[str]] = {}
    for i in range(len(config.layers)):
        layers.setdefault(parts_left(config, i, recipe, lm_head, mtp), []).append(str(i))
    for parts, numbers in layers.items():
        # Engines have some modules one deeper: moe.share_expert, mtp_block.self_attn.
        inner = "" if parts == ("",) else rf"(.*\.)?({'|'.join(map(re.escape, parts))})(\.|$)"
        names.append(rf"(.*\.)?layers\.({'|'.join(numbers)})\.{inner}")
    names += [r"(.*\.)?vision_model\.", r"(.*\.)?vit_large_projector(\.|$)"] if config.vision else []
    return [f"re:{name}" for name in names]


def quantization_config(patterns: list[str], kv_cache: str, lm_head: bool) -> dict:
    """The quantization_config of config.json."""
    group = {
        "targets": ["Linear", *(_HEADS if lm_head else [])],
        "weights": _NUMBER | {"dynamic": False},
        "input_activations": _NUMBER | {"dynamic": "local"},
        "format": "nvfp4-pack-quantized",
    }
    return {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "ignore": patterns,
        "kv_cache_scheme": _CACHE if kv_cache == "fp8" else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": VERSION,
    }
