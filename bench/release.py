"""Step-3.7-Flash's shape without its checkpoint."""

from __future__ import annotations

from step_kernels.model import StepConfig
from step_kernels.model.config import FULL, SLIDING


def released_config(layers: int) -> StepConfig:
    """Step-3.7-Flash's widths with its first `layers` trunk layers; the last two clamp, as the release's do."""
    return StepConfig.from_dict(released(layers))


def released(layers: int) -> dict:
    """The same as a config.json says it."""
    types = [FULL if i % 4 == 0 else SLIDING for i in range(layers)] + [SLIDING] * 3

    def clamped(limit):
        return [limit if layers - 2 <= i < layers else 0.0 for i in range(layers + 3)]

    text = {
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128896,
        "max_position_embeddings": 262144,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "layer_types": types,
        "sliding_window": 512,
        "rope_theta": [5e6 if t == FULL else 1e4 for t in types],
        "partial_rotary_factors": [0.5 if t == FULL else 1.0 for t in types],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": [FULL],
        "moe_layers_enum": list(range(min(3, layers), layers)),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": clamped(7.0),
        "swiglu_limits_shared": clamped(16.0),
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
    }
    vision = {"image_size": 728, "patch_size": 14, "width": 1536, "layers": 47, "heads": 16}
    return {"image_token_id": 128001, "vision_config": vision, "text_config": text}
