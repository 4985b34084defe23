"""What the bundled checkpoint is: a small Step-3.7 with every feature of the big one. bench.train_bundled trains it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from step_kernels.model.config import FULL, SLIDING

BUNDLED = Path(__file__).parents[1] / "step_kernels" / "model" / "bundled"
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|stop|>", "<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>",
    "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>", "<think>", "</think>",
)  # fmt: skip
VOCAB = 2048
TRUNK, MTP = (FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING), 3
TYPES = TRUNK + (SLIDING,) * MTP
SHARD_BYTES = 10e6


def config() -> dict:
    """The released config.json's schema. The clamps are as tight as layers this narrow need for them to bind."""

    def by_type(full, sliding):
        return [full if t == FULL else sliding for t in TYPES]

    def limits(value):
        return [value if i in (len(TRUNK) - 2, len(TRUNK) - 1) else 0.0 for i in range(len(TYPES))]

    text = {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": len(TRUNK),
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "max_seq_len": 4096,
        "num_attention_heads": 8,
        "num_attention_groups": 2,
        "head_dim": 32,
        "att_impl_type": "GQA",
        "use_head_wise_attn_gate": True,
        "torch_dtype": "bfloat16",
        "layer_types": list(TYPES),
        "sliding_window": 64,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": 12,
            "num_attention_groups": 2,
            "head_dim": 32,
        },
        "rope_theta": by_type(5e6, 1e4),
        "partial_rotary_factors": by_type(0.5, 1.0),
        # Scaled so that in 16 rotary dims some wavelengths are kept, some blended and some divided.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": [FULL],
        "use_rope_layers": [],
        "moe_layers_enum": "3,4,5,6,7",
        "moe_num_experts": 32,
        "moe_top_k": 4,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": limits(2.0),
        "swiglu_limits_shared": limits(3.0),
        "num_nextn_predict_layers": MTP,
        "bos_token_id": 0,
        "eos_token_id": [1, 2, SPECIAL.index("<|im_end|>")],
    }
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "image_token_id": SPECIAL.index("<im_patch>"),
        "image_token_len": 9,
        "patch_token_len": 4,
        "use_im_start_end": "true",
        "im_start_token": "<im_start>",
        "im_patch_token": "<im_patch>",
        "im_end_token": "<im_end>",
        "understand_projector_stride": 2,
        "vision_select_layer": -1,
        "projector_bias": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "perception_encoder",
            "image_size": 168,
            "patch_size": 14,
            "width": 64,
            "layers": 3,
            "heads": 4,
            "mlp_ratio": 2.0,
            "use_cls_token": False,
            "use_ln_post": False,
            "ls_init_value": 0.1,
            "hidden_act": "quick_gelu",
            "pool_type": "none",
            "output_dim": None,
        },
        "text_config": text,
    }


def tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """config.json and the tensors in shards of about 10 MB, the vision encoder's last, as the release has it."""
    (folder / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    shards, size = [[]], 0
    for name in sorted(tensors, key=lambda n: n.startswith("vi")):
        last = shards[-1][-1:]
        if size > SHARD_BYTES or (last and name.startswith("vi") and not last[0].startswith("vi")):
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].numel() * tensors[name].itemsize
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.itemsize for t in tensors.values())},
        "weight_map": {n: file for file, names in zip(files, shards) for n in sorted(names)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
