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


def weight_groups(config: StepConfig, recipe: str, lm_head: bool, mtp: bool = False) -> list[tuple[str, ...]]:
    """Canonical names of the weights that a recipe quantizes, those with one global scale together.

    `linears` takes the trunk's layers, `mtp` those that draft: the release keeps these in BF16.
    """
    names = []
    for i, layer in enumerate(config.layers):
        drafts, modules = i >= config.num_layers, {}
        if mtp if drafts else recipe == "linears":
            modules = {"self_attn": ATTENTION_GROUPS, "share_expert" if layer.moe else "mlp": GROUPS}
        if layer.moe:
            modules["moe"] = GROUPS
        if drafts and mtp and lm_head:
            modules[SHARED_HEAD] = (("output",),)
        for module, groups in modules.items():
            names += [tuple(weight_name(i, projection, module) for projection in group) for group in groups]
    return [*names, ("lm_head.weight",)] if lm_head else names


def parts_left(config: StepConfig, layer: int, recipe: str, lm_head: bool, mtp: bool) -> tuple[str, ...]:
    """The modules with linears of a layer that a recipe leaves alone, `("",)` for all of the layer.

    eh_proj is among them since vLLM never builds it quantized.
    """
    drafts, moe = layer >= config.num_layers, config.layers[layer].moe
    linears = mtp if drafts else recipe == "linears"
    if not (linears or moe):
        return ("",)
    parts = ("self_attn.g_proj",) if linears else ("self_attn", "share_expert")
    parts += ("moe.gate",) if moe else ()
    if drafts:
        parts += ("eh_proj",) if linears and lm_head else ("eh_proj", "shared_head")
    return parts


def weight_name(layer: int, projection: str, module: str = "moe") -> str:
    """The canonical name of a projection's weight; by default the experts' stacked one."""
    return f"model.layers.{layer}.{module}.{projection}.weight"


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
