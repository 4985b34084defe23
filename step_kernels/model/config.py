"""config.json, checked and resolved: what each layer is, with nothing left to look up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointError, read_json
from .fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeScaling:
    """llama3 frequency scaling."""

    factor: float
    original_max: float
    low_freq: float
    high_freq: float


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. window: keys a token sees, itself included; limits: None where nothing is clamped."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling | None
    moe: bool
    limit: float | None
    shared_limit: float | None


@dataclass(frozen=True)
class VisionConfig:
    """The perception encoder; sizes in pixels, tokens a view after the two downsamplers."""

    image_size: int
    crop_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    image_tokens: int
    crop_tokens: int


@dataclass(frozen=True)
class StepConfig:
    """A Step-3.5 (text) or Step-3.7 (text and images) model. `layers` holds the trunk's, then the MTP layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_mtp: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    max_positions: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    router_scale: float
    bos_id: int
    eos_ids: tuple[int, ...]
    image_token_id: int | None
    vision: VisionConfig | None

    @classmethod
    def read(cls, path: str | Path) -> StepConfig:
        """From a config.json or the folder that holds it."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, data: dict, source: str = "config.json") -> StepConfig:
        """From the parsed JSON; `source` names it in errors."""
        top = Fields(data, source)
        text = top.part("text_config") if "text_config" in data else top
        text.data = _released_spelling(text.data)
        kind = text.get("model_type", "step3p5", str)
        if kind not in ("step3p5", "step3p7"):
            raise CheckpointError(f"{source}: model_type is {kind!r}, wanted step3p5 or step3p7")
        num_layers = text.size("num_hidden_layers")
        num_mtp = text.get("num_nextn_predict_layers", 0, int)
        if num_mtp < 0:
            text.fail("num_nextn_predict_layers", "0 or more")
        layers = _layers(text, num_layers, num_mtp)
        eos = text.data.get("eos_token_id", data.get("eos_token_id"))
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(e) is int for e in eos):
            raise CheckpointError(f"{source}: eos_token_id is {eos}, wanted a token id or a list of them")
        config = cls(
            vocab_size=text.size("vocab_size"),
            hidden_size=text.size("hidden_size"),
            intermediate_size=text.size("intermediate_size"),
            num_layers=num_layers,
            num_mtp=num_mtp,
            layers=layers,
            rms_norm_eps=text.get("rms_norm_eps", 1e-5, float),
            max_positions=text.size("max_position_embeddings"),
            num_experts=text.size("moe_num_experts"),
            top_k=text.size("moe_top_k"),
            moe_intermediate_size=text.size("moe_intermediate_size"),
            share_expert_dim=text.size("share_expert_dim"),
            router_scale=text.number("moe_router_scaling_factor"),
            bos_id=text.get("bos_token_id", 0, int),
            eos_ids=tuple(eos),
            image_token_id=top.get("image_token_id", None, int),
            vision=_vision(top) if "vision_config" in data else None,
        )
        if config.top_k > config.num_experts:
            raise CheckpointError(f"{source}: moe_top_k is {config.top_k}, more than {config.num_experts} experts")
        if config.vision and config.image_token_id is None:
            raise CheckpointError(f"{source}: vision_config is there but image_token_id is missing")
        return config


def _layers(text: Fields, trunk: int, mtp: int) -> tuple[LayerConfig, ...]:
    count = trunk + mtp
    types = text.per_layer("layer_types", count, (str,))
    if None in types[:trunk] or set(types) - {FULL, SLIDING, None}:
        text.fail("layer_types", f"a list of {trunk} or more of {FULL}, {SLIDING}")
    types = [t or SLIDING for t in types]  # MTP layers slide
    if SLIDING in types:
        text.size("sliding_window")
    thetas = text.per_layer("rope_theta", count, (int, float), 1e4)
    rotary = text.per_layer("partial_rotary_factors", count, (int, float), 1.0)
    limits, shared = (text.per_layer(f"swiglu_limits{s}", count, (int, float)) for s in ("", "_shared"))
    enum = text.data.get("moe_layers_enum")
    try:
        moe = {int(i) for i in (enum.split(",") if isinstance(enum, str) else enum) if i != ""}
    except (TypeError, ValueError):
        moe = {-1}
    if not moe <= set(range(count)):
        text.fail("moe_layers_enum", f"a list of layers from 0 to {count - 1}, or a string with commas")
    if text.data.get("use_rope_layers"):
        text.fail("use_rope_layers", "none listed: rope is on every layer")
    for name, wanted in (("use_head_wise_attn_gate", True), ("moe_router_activation", "sigmoid")):
        if text.data.get(name, wanted) != wanted:
            text.fail(name, json.dumps(wanted))
    scaling, scaled_types = _rope_scaling(text), text.data.get("yarn_only_types") or [FULL]
    other = text.part("attention_other_setting") if "attention_other_setting" in text.data else text
    layers = []
    for i, kind in enumerate(types):
        fields = other if kind == SLIDING else text
        head_dim = fields.size("head_dim")
        theta = thetas[i] if thetas[i] is not None else thetas[types.index(kind)]
        share = rotary[i] if rotary[i] is not None else rotary[types.index(kind)]
        layers.append(
            LayerConfig(
                heads=fields.size("num_attention_heads"),
                kv_heads=fields.size("num_attention_groups"),
                head_dim=head_dim,
                window=text.size("sliding_window") if kind == SLIDING else None,
                rope_theta=float(theta),
                rotary_dim=int(head_dim * share),
                rope_scaling=scaling if kind in scaled_types else None,
                moe=i in moe and i < trunk,
                limit=limits[i] or None,
                shared_limit=shared[i] or None,
            )
        )
        if layers[-1].heads % layers[-1].kv_heads:
            fields.fail("num_attention_heads", f"a multiple of num_attention_groups = {layers[-1].kv_heads}")
    return tuple(layers)


def _released_spelling(text: dict) -> dict:
    """The released schema's fields of a text config that transformers saved, which renames and regroups them."""
    text = dict(text)
    for theirs, released in (
        ("num_key_value_heads", "num_attention_groups"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_top_k"),
    ):
        if theirs in text:
            text.setdefault(released, text[theirs])
    if isinstance(text.get("layer_types"), list) and isinstance(text.get("mtp_layer_types"), list):
        text["layer_types"] = text["layer_types"] + text["mtp_layer_types"]
    if isinstance(text.get("mlp_layer_types"), list):
        text.setdefault("moe_layers_enum", [i for i, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse"])
    if "num_sliding_attention_heads" in text:
        heads = text["num_sliding_attention_heads"]
        text.setdefault("attention_other_setting", {**text, "num_attention_heads": heads})
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get(FULL), dict):
        kinds = [rope.get(kind) or rope[FULL] for kind in text.get("layer_types") or ()]
        text.setdefault("rope_theta", [kind.get("rope_theta") for kind in kinds])
        text.setdefault("partial_rotary_factors", [kind.get("partial_rotary_factor", 1.0) for kind in kinds])
        scaled = [kind for kind in (FULL, SLIDING) if (rope.get(kind) or {}).get("rope_type", "default") != "default"]
        text["rope_parameters"] = rope[scaled[0]] if scaled else None
        text.setdefault("yarn_only_types", scaled)
    return text


def _rope_scaling(text: Fields) -> RopeScaling | None:
    name = "rope_scaling" if text.data.get("rope_scaling") else "rope_parameters"
    if not text.data.get(name):
        return None
    fields = text.part(name)
    if fields.data.get("rope_type", "factor" not in fields.data and "default") == "default":
        return None
    if fields.data.get("rope_type") != "llama3":
        fields.fail("rope_type", "llama3 or default")
    names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    return RopeScaling(*(fields.number(n) for n in names))


def _vision(top: Fields) -> VisionConfig:
    fields = top.part("vision_config")
    for theirs, released in (
        ("hidden_size", "width"),
        ("num_hidden_layers", "layers"),
        ("num_attention_heads", "heads"),
    ):
        if theirs in fields.data:  # as transformers saves it
            fields.data.setdefault(released, fields.data[theirs])
    patch, width, heads = fields.size("patch_size"), fields.size("width"), fields.size("heads")
    if fields.size("image_size") % (4 * patch):
        fields.fail("image_size", f"a multiple of 4 patches, {4 * patch}")
    if width % (4 * heads):  # the 2-D rope turns pairs of both axes in every head
        fields.fail("width", f"a multiple of 4 * heads = {4 * heads}")
    image_tokens = top.get("image_token_len", (fields.size("image_size") // (4 * patch)) ** 2, int)
    crop_tokens = top.get("patch_token_len", 81, int)
    # Two stride-2 downsamplers: a view of g x g tokens is g * 4 patches wide (169 -> 728, 81 -> 504 pixels).
    crop_size = round(crop_tokens**0.5) * 4 * patch
    if image_tokens != (fields.size("image_size") // (4 * patch)) ** 2:
        top.fail("image_token_len", f"the square of image_size / {4 * patch}")
    if (crop_size // (4 * patch)) ** 2 != crop_tokens:
        top.fail("patch_token_len", "a square number")
    return VisionConfig(
        image_size=fields.size("image_size"),
        crop_size=crop_size,
        patch_size=patch,
        width=width,
        layers=fields.size("layers"),
        heads=heads,
        mlp_width=round(width * fields.get("mlp_ratio", 8960 / 1536, float)),
        image_tokens=image_tokens,
        crop_tokens=crop_tokens,
    )
