"""Makes the bundled checkpoint: a miniature Step-3.7 with every feature of the big one, from a fixed seed.

python -m bench.bundled [FOLDER]
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from step_kernels.cli import Parser
from step_kernels.model.config import FULL, SLIDING, StepConfig
from step_kernels.model.step import Step3p7
from step_kernels.model.weights import RandomWeights

BUNDLED = Path(__file__).parents[1] / "step_kernels" / "model" / "bundled"
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|stop|>", "<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>",
    "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>", "<think>", "</think>",
)  # fmt: skip
CORPUS = """
A mixture of experts sends each token to a few of its experts and adds what they say. The router scores every
expert, keeps the best of them, and weighs their answers. The tensors of a checkpoint are read one by one, an
expert at a time, and each block of sixteen weights shares a scale. The largest weight of the block and the largest
of the tensor set the two scales; a search tries the scales around them and keeps the one with the least error.
Attention reads the keys and the values of the tokens before, all of them in the full layers and the last of them
in the sliding layers. The picture is cut into crops, the crops are read by the encoder, and their features take
the places of the image tokens. What is this? What is in the picture? There is a house with a red roof and a door,
the sun is in the sky, and the grass is green. Hello! Here is the answer to the question that you have asked.
Write one short sentence. Count the numbers: one, two, three, four, five, six, seven, eight, nine, ten.
"""
TRUNK, MTP = (FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING), 3
TYPES = TRUNK + (SLIDING,) * MTP


def config() -> dict:
    """The released config.json's schema, with widths of a few dozen."""

    def by_type(full, sliding):
        return [full if t == FULL else sliding for t in TYPES]

    def limits(value):
        return [value if i in (len(TRUNK) - 2, len(TRUNK) - 1) else 0.0 for i in range(len(TYPES))]

    text = {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(TRUNK),
        "vocab_size": 448,
        "max_position_embeddings": 4096,
        "max_seq_len": 4096,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 32,
        "att_impl_type": "GQA",
        "use_head_wise_attn_gate": True,
        "torch_dtype": "bfloat16",
        "layer_types": list(TYPES),
        "sliding_window": 24,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": 6,
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
        "moe_layers_enum": "3,4,5",
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": limits(7.0),
        "swiglu_limits_shared": limits(16.0),
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
            "width": 24,
            "layers": 2,
            "heads": 2,
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


class Recorder(RandomWeights):
    """Random weights that remember what the model asked for; `tensors` is the checkpoint."""

    def __init__(self):
        super().__init__(torch.device("cpu"), torch.bfloat16, nvfp4=False, seed=37)
        self.tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> torch.Tensor:
        x = super().tensor(name, shape, keep)
        if name.endswith("moe.gate.weight"):
            x = x.bfloat16()
        elif name.endswith(("4.moe.gate_proj.weight", "5.moe.gate_proj.weight")):
            x *= 4  # so that silu(gate) passes 7 and the clamp binds
        elif name.endswith(("4.share_expert.gate_proj.weight", "5.share_expert.gate_proj.weight")):
            x *= 8
        self.tensors[name] = x.contiguous()
        return x


def tokenizer(corpus: str) -> Tokenizer:
    """Byte-level BPE of 448 tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def picture() -> Image.Image:
    """A scene that is wider than a view, so it is cut into crops."""
    image = Image.new("RGB", (240, 150), (135, 190, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 100, 240, 150), fill=(90, 150, 80))
    draw.ellipse((180, 12, 216, 48), fill=(250, 220, 90))
    draw.rectangle((40, 60, 110, 120), fill=(190, 110, 80))
    draw.polygon(((30, 60), (75, 25), (120, 60)), fill=(120, 50, 45))
    draw.rectangle((66, 88, 84, 120), fill=(80, 50, 30))
    return image


def main() -> None:
    parser = Parser(prog="python -m bench.bundled", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=BUNDLED, help="where to write it (the package's own)")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    weights = Recorder()
    Step3p7(StepConfig.from_dict(config()), weights, MTP)
    # Two shards, as the release keeps its vision encoder apart.
    vision = {n: t for n, t in weights.tensors.items() if n.startswith("vi")}
    text = {n: t for n, t in weights.tensors.items() if n not in vision}
    shards = {"model-00001-of-00002.safetensors": text, "model-00002-of-00002.safetensors": vision}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.itemsize for t in weights.tensors.values())},
        "weight_map": {n: name for name, tensors in shards.items() for n in sorted(tensors)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    tokenizer(CORPUS).save(str(folder / "tokenizer.json"))
    picture().save(folder / "picture.png", optimize=True)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {sum(t.numel() for t in weights.tensors.values()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
