"""A small source for the converter's tests, in the released schema, gate and up in different shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantize.layout import GROUPS, expert_shapes, tensor_shapes
from quantize.nvfp4 import main
from step_kernels.model.checkpoint import INDEX
from step_kernels.model.config import StepConfig

PROJECTIONS = [p for group in GROUPS for p in group]
# 192 and 144 are multiples of 16 but not of FP8's 128.
TEXT = {
    "model_type": "step3p5",
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_attention_groups": 1,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 4,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 144,
    "share_expert_dim": 32,
    "moe_router_scaling_factor": 3.0,
}


def tensors_of(text: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, config = torch.Generator().manual_seed(seed), StepConfig.from_dict(text)
    shapes = tensor_shapes(config) | expert_shapes(config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    return {name: t if name.endswith("router_bias") else t.bfloat16() for name, t in tensors.items()}


def write_source(folder: Path, text: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Four shards: gate in the second, up in the third, down in the fourth, the rest in turn."""
    folder.mkdir()
    shards = [{} for _ in range(4)]
    for i, (name, t) in enumerate(tensors.items()):
        place = next((n for n, p in enumerate(PROJECTIONS, 1) if f".moe.{p}." in name), i % 4)
        shards[place][name] = t
    files = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    for file, shard in zip(files, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard if "scale_inv" not in name}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refused(capsys, status: int, *arguments: str) -> str:
    """The one line on stderr of a command that must fail with `status`."""
    assert main([str(a) for a in arguments]) == status
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text
