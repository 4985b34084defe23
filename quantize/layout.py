"""The tensors of a model, their shapes by its config, and what the quantized ones become."""

from __future__ import annotations

import math

from step_kernels.model.config import StepConfig, VisionConfig
from step_kernels.nvfp4 import BLOCK

FP8_BLOCK = 128  # rows and columns that share one weight_scale_inv
# Projections that share one global scale: engines compute gate and up (q, k and v) in one GEMM, with one scale for all.
GROUPS = (("gate_proj", "up_proj"), ("down_proj",))
# No g_proj: SGLang and TensorRT-LLM build that one without quantization, and it is 0.4 % of a layer's attention.
ATTENTION_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
SHARED_HEAD = "transformer.shared_head"  # of an MTP layer
NVFP4, FP8, SOURCE = PRECISIONS = ("nvfp4", "fp8", "source")  # of a weight; FP8: e4m3 with an f32 scale a row
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # a group's first projection: engines' module of all


def tensor_shapes(config: StepConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model but the routed experts, by canonical name. [out, in] for linear layers."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for i, layer in enumerate(config.layers):
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        parts = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "self_attn.g_proj": (layer.heads, hidden),
            "self_attn.q_norm": (layer.head_dim,),
            "self_attn.k_norm": (layer.head_dim,),
        }
        inner, mlp = (config.share_expert_dim, "share_expert") if layer.moe else (config.intermediate_size, "mlp")
        parts |= {f"{mlp}.gate_proj": (inner, hidden), f"{mlp}.up_proj": (inner, hidden)}
        parts |= {f"{mlp}.down_proj": (hidden, inner)}
        if layer.moe:
            parts |= {"moe.gate": (config.num_experts, hidden)}
        if i >= config.num_layers:
            parts |= {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden)}
            parts |= {"transformer.shared_head.norm": (hidden,), "transformer.shared_head.output": (vocab, hidden)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    if config.vision:
        shapes["vit_large_projector"] = (hidden, 4 * config.vision.width)
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {
        f"model.layers.{i}.moe.router_bias": (config.num_experts,) for i, layer in enumerate(config.layers) if layer.moe
    }
    return shapes | (_vision_shapes(config.vision) if config.vision else {})


def expert_shapes(config: StepConfig) -> dict[str, tuple[int, int, int]]:
    """The routed experts' stacked weights, by canonical name: [experts, out, in]."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return {
        weight_name(i, projection): (experts, hidden, inner) if projection == "down_proj" else (experts, inner, hidden)
        for i, layer in enumerate(config.layers)
        if layer.moe
        for projections in GROUPS
        for projection in projections
    }


def weight_modules(config: StepConfig) -> dict[str, list[tuple[str, ...]]]:
    """What engines can build quantized: module -> canonical names of its weights, in groups that must be alike."""
    modules = {}
    for i, layer in enumerate(config.layers):
        parts = {"self_attn": ATTENTION_GROUPS, "share_expert" if layer.moe else "mlp": GROUPS}
        parts |= {"moe": GROUPS} if layer.moe else {}
        parts |= {SHARED_HEAD: (("output",),)} if i >= config.num_layers else {}
        for part, groups in parts.items():
            names = [tuple(weight_name(i, projection, part) for projection in group) for group in groups]
            modules[f"model.layers.{i}.{part}"] = names
    return modules | {"lm_head": [("lm_head.weight",)]}


def weight_groups(config: StepConfig) -> list[tuple[str, ...]]:
    """The groups of all modules: weights of one precision, in NVFP4 with one global scale."""
    return [group for groups in weight_modules(config).values() for group in groups]


def is_expert(weight: str) -> bool:
    """Whether a canonical name is that of routed experts' weights."""
    return any(f".moe.{projection}." in weight for group in GROUPS for projection in group)


def recipe_precisions(config: StepConfig, recipe: str, rest: str, lm_head: bool, mtp: bool) -> dict[str, str]:
    """The precision of each group, by its first weight, by a recipe and what it has `rest` become.

    Routed experts are always in NVFP4. `lm_head` takes in the heads, `mtp` the layers that draft: in NVFP4 too where
    the rest stays as it is. The release keeps both in BF16.
    """
    found = {}
    for leader, *_ in weight_groups(config):
        is_head = leader == "lm_head.weight" or SHARED_HEAD in leader
        drafts = (layer_number(leader) or 0) >= config.num_layers
        if is_expert(leader):
            found[leader] = NVFP4
        elif (is_head and not lm_head) or (drafts and not mtp):
            found[leader] = SOURCE
        else:
            found[leader] = NVFP4 if recipe != "experts" or (drafts and rest == SOURCE) else rest
    return found


def parts_left(config: StepConfig, layer: int, precisions: dict[str, str]) -> tuple[str, ...]:
    """The modules with linears of a layer that stay as they are, `("",)` for all of the layer.

    Of a module in several precisions also engines' names of several projections in one. eh_proj is among them since
    vLLM never builds it quantized.
    """
    drafts, moe, parts = layer >= config.num_layers, config.layers[layer].moe, []
    modules = weight_modules(config)
    for part in ("self_attn", "share_expert" if moe else "mlp"):
        groups = modules[f"model.layers.{layer}.{part}"]
        kept = [group for group in groups if precisions[group[0]] == SOURCE]
        if len(kept) == len(groups):
            parts.append(part)
        else:
            parts += ["self_attn.g_proj"] if part == "self_attn" else []
            parts += [name for group in kept for name in engine_names(group)]
    head_left = drafts and precisions[weight_name(layer, "output", SHARED_HEAD)] == SOURCE
    if parts == ["self_attn", "mlp"] and head_left == drafts:
        return ("",)
    parts += ["moe.gate"] if moe else []
    parts += ["eh_proj"] if drafts else []
    return (*parts, *(["shared_head"] if head_left else []))


def engine_names(group: tuple[str, ...]) -> list[str]:
    """The modules of a group's weights without their layer, and what engines call several of them in one."""
    names = [projection_name(weight) for weight in group]
    module, _, first = names[0].rpartition(".")
    return names + ([f"{module}.{_FUSED[first]}"] if len(names) > 1 else [])


def weight_name(layer: int, projection: str, module: str = "moe") -> str:
    """The canonical name of a projection's weight; by default the experts' stacked one."""
    return f"model.layers.{layer}.{module}.{projection}.weight"


def layer_number(name: str) -> int | None:
    """N of a canonical `model.layers.N.*`."""
    part = name.split(".")
    return int(part[2]) if part[:2] == ["model", "layers"] and len(part) > 2 and part[2].isdecimal() else None


def projection_name(weight: str) -> str:
    """What the error table calls a weight: its name without layer, such as self_attn.q_proj, moe.up_proj, lm_head."""
    return ".".join(weight.split(".")[-3:-1]) if weight.startswith("model.") else weight.removesuffix(".weight")


def inverse_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an FP8 source's weight_scale_inv: one a 128 x 128 block, the last ones partial."""
    return (*shape[:-2], *(-(-n // FP8_BLOCK) for n in shape[-2:]))


def _vision_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, patch, grid = vision.width, vision.patch_size, vision.image_size // vision.patch_size
    shapes = {"conv1.weight": (width, 3, patch, patch), "positional_embedding": (grid * grid, width)}
    linears = {"vit_downsampler1": (2 * width, width, 3, 3), "vit_downsampler2": (4 * width, 2 * width, 3, 3)}
    norms = ["ln_pre"]
    for i in range(vision.layers):
        block = f"transformer.resblocks.{i}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        shapes |= {f"{block}ls_{n}.gamma": (width,) for n in (1, 2)}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        linears |= {f"{block}attn.out_proj": (width, width)}
        linears |= {f"{block}mlp.c_fc": (vision.mlp_width, width), f"{block}mlp.c_proj": (width, vision.mlp_width)}
    linears |= dict.fromkeys(norms, (width,))
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def nvfp4_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the codes, block scales and global scales of a weight [n, k] or [experts, n, k]."""
    count = math.prod(shape)
    return count // 2 + count // BLOCK + 4 * math.prod(shape[:-2])


def fp8_bytes(shape: tuple[int, int]) -> int:
    """Bytes of the codes and row scales of a weight [n, k] in FP8."""
    return math.prod(shape) + 4 * shape[0]
