"""StepConfig of the released config.json, of the first NVFP4 upload's shorter one, and of broken ones."""

from __future__ import annotations

import json

import pytest

from step_kernels.model.checkpoint import CheckpointError
from step_kernels.model.config import LayerConfig, RopeScaling, StepConfig, VisionConfig


def released() -> dict:
    """stepfun-ai/Step-3.7-Flash's config.json, less the fields that say what every version does."""
    full = [i % 4 == 0 for i in range(48)]
    text = {
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128896,
        "max_position_embeddings": 262144,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "use_head_wise_attn_gate": True,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "sliding_window": 512,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "rope_theta": [5e6 if f else 1e4 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": [7.0 if i in (43, 44) else 0.0 for i in range(48)],
        "swiglu_limits_shared": [16.0 if i in (43, 44) else 0.0 for i in range(48)],
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
    }
    vision = {"image_size": 728, "patch_size": 14, "width": 1536, "layers": 47, "heads": 16}
    top = {"model_type": "step3p7", "image_token_id": 128001, "image_token_len": 169, "patch_token_len": 81}
    return {**top, "text_config": text, "vision_config": vision}


def changed(path: str, value) -> dict:
    """The released config with one field set, or left out for `...`."""
    data = released()
    *parents, name = path.split(".")
    fields = data
    for parent in parents:
        fields = fields[parent]
    fields[name] = value
    if value is ...:
        del fields[name]
    return data


def test_the_released_config_has_12_full_and_33_sliding_layers_then_3_sliding_mtp_layers():
    config = StepConfig.from_dict(released())
    assert (config.num_layers, config.num_mtp, len(config.layers)) == (45, 3, 48)
    full = [i for i, layer in enumerate(config.layers) if layer.window is None]
    assert full == list(range(0, 45, 4)) and len(full) == 12
    scaling = RopeScaling(factor=2.0, original_max=131072, low_freq=1.0, high_freq=32.0)
    assert config.layers[4] == LayerConfig(64, 8, 128, None, 5e6, 64, scaling, True, None, None)
    assert config.layers[0] == LayerConfig(64, 8, 128, None, 5e6, 64, scaling, False, None, None)
    assert config.layers[5] == LayerConfig(96, 8, 128, 512, 1e4, 128, None, True, None, None)
    assert config.layers[45:] == (LayerConfig(96, 8, 128, 512, 1e4, 128, None, False, None, None),) * 3


def test_limits_act_on_layers_43_and_44_alone_and_experts_on_3_to_44():
    layers = StepConfig.from_dict(released()).layers
    assert [i for i, layer in enumerate(layers) if layer.moe] == list(range(3, 45))
    clamped = {
        i: (layer.limit, layer.shared_limit) for i, layer in enumerate(layers) if layer.limit or layer.shared_limit
    }
    assert clamped == {43: (7.0, 16.0), 44: (7.0, 16.0)}
    assert layers[0].limit is None  # 0 in the file means no clamp


def test_sizes_tokens_and_vision_are_the_releases():
    config = StepConfig.from_dict(released())
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (128896, 4096, 11264)
    assert (config.num_experts, config.top_k, config.moe_intermediate_size, config.share_expert_dim) == (
        288,
        8,
        1280,
        1280,
    )
    assert (config.router_scale, config.rms_norm_eps, config.max_positions) == (3.0, 1e-5, 262144)
    assert (config.bos_id, config.eos_ids, config.image_token_id) == (0, (1, 2, 128007), 128001)
    assert config.vision == VisionConfig(
        image_size=728, crop_size=504, patch_size=14, width=1536, layers=47, heads=16,
        mlp_width=8960, image_tokens=169, crop_tokens=81,
    )  # fmt: skip


def test_a_rounded_mlp_ratio_still_gives_8960():
    assert StepConfig.from_dict(changed("vision_config.mlp_ratio", 5.8333333)).vision.mlp_width == 8960


def test_lists_of_45_entries_give_the_same_layers_as_lists_of_48():
    data = released()
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        data["text_config"][name] = data["text_config"][name][:45]
    assert StepConfig.from_dict(data) == StepConfig.from_dict(released())


def test_expert_layers_may_be_a_list_and_eos_one_number():
    assert StepConfig.from_dict(changed("text_config.moe_layers_enum", [*range(3, 45)])) == StepConfig.from_dict(
        released()
    )
    assert StepConfig.from_dict(changed("text_config.eos_token_id", 7)).eos_ids == (7,)


def test_a_text_only_config_is_its_own_text_config():
    config = StepConfig.from_dict(released()["text_config"])
    assert config.vision is None and config.image_token_id is None
    assert config.layers == StepConfig.from_dict(released()).layers


def test_the_config_is_read_from_a_file_or_its_folder_and_the_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released()))
    assert StepConfig.read(tmp_path) == StepConfig.read(tmp_path / "config.json") == StepConfig.from_dict(released())
    (tmp_path / "config.json").write_text(json.dumps(changed("text_config.head_dim", ...)))
    with pytest.raises(
        CheckpointError, match=r"config.json: text_config.head_dim is missing, wanted a positive integer"
    ):
        StepConfig.read(tmp_path)


BAD = [
    ("model_type is 'llama', wanted step3p5 or step3p7", "text_config.model_type", "llama"),
    ("text_config is 3, wanted an object", "text_config", 3),
    ("text_config.hidden_size is missing, wanted a positive integer", "text_config.hidden_size", ...),
    ("text_config.num_hidden_layers is '45', wanted a positive integer", "text_config.num_hidden_layers", "45"),
    ("text_config.vocab_size is True, wanted a positive integer", "text_config.vocab_size", True),
    ("text_config.moe_num_experts is 0, wanted a positive integer", "text_config.moe_num_experts", 0),
    ("text_config.moe_router_scaling_factor is missing, wanted a number", "text_config.moe_router_scaling_factor", ...),
    ("text_config.layer_types is missing, wanted a list of 45 or more", "text_config.layer_types", ...),
    ("text_config.layer_types is .*, wanted a list of 45", "text_config.layer_types", ["full_attention"] * 44),
    ("text_config.layer_types is .*, wanted a list of 45", "text_config.layer_types", ["linear_attention"] * 48),
    ("text_config.sliding_window is missing", "text_config.sliding_window", ...),
    ("text_config.rope_theta is 'big', wanted int or float, or a list", "text_config.rope_theta", "big"),
    ("text_config.swiglu_limits is .*, wanted int or float", "text_config.swiglu_limits", [True] * 48),
    ("text_config.moe_layers_enum is '3,x', wanted a list of layers from 0", "text_config.moe_layers_enum", "3,x"),
    ("text_config.moe_layers_enum is missing", "text_config.moe_layers_enum", ...),
    ("text_config.moe_layers_enum is .*, wanted a list of layers from 0 to 47", "text_config.moe_layers_enum", [3, 48]),
    ("num_nextn_predict_layers is -1, wanted 0 or more", "text_config.num_nextn_predict_layers", -1),
    ("text_config.layer_types is", "text_config.layer_types", ["full_attention"] * 45 + ["mamba"] * 3),
    ("text_config.use_rope_layers is", "text_config.use_rope_layers", [1]),
    ("rope_scaling.rope_type is missing, wanted llama3", "text_config.rope_scaling.rope_type", ...),
    ("vision_config.width is 1540, wanted a multiple of 4", "vision_config.width", 1540),
    ("vision_config.image_size is 730, wanted a multiple of 4 patches", "vision_config.image_size", 730),
    ("text_config.use_head_wise_attn_gate is False, wanted true", "text_config.use_head_wise_attn_gate", False),
    ("text_config.moe_router_activation is 'softmax'", "text_config.moe_router_activation", "softmax"),
    ("text_config.rope_scaling.rope_type is 'yarn', wanted llama3", "text_config.rope_scaling.rope_type", "yarn"),
    ("text_config.rope_scaling.factor is missing, wanted a number", "text_config.rope_scaling.factor", ...),
    ("attention_other_setting.num_attention_heads is 97, wanted a multiple of num_attention_groups = 8",
     "text_config.attention_other_setting.num_attention_heads", 97),
    ("eos_token_id is .*, wanted a token id or a list", "text_config.eos_token_id", [1, "2"]),
    ("moe_top_k is 289, more than 288 experts", "text_config.moe_top_k", 289),
    ("image_token_id is missing", "image_token_id", ...),
    ("vision_config.width is missing", "vision_config.width", ...),
    ("image_token_len is 170, wanted the square of image_size / 56", "image_token_len", 170),
    ("patch_token_len is 80, wanted a square number", "patch_token_len", 80),
]  # fmt: skip


@pytest.mark.parametrize(("message", "path", "value"), BAD, ids=[f"{b[1]}={b[2]!r:.12}" for b in BAD])
def test_a_missing_or_wrong_field_is_named_with_its_file(message, path, value):
    with pytest.raises(CheckpointError, match=f"^shard/config.json: .*{message}") as error:
        StepConfig.from_dict(changed(path, value), "shard/config.json")
    assert "\n" not in str(error.value)


def test_reading_leaves_the_dictionary_as_it_was():
    data = released()
    StepConfig.from_dict(data)
    assert data == released()
