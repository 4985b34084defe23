"""The first NVFP4 upload of Step-3.7-Flash in miniature: 13 shards, no MTP layers, lists of the trunk's layers only."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from small_checkpoint import read

from quantize import Settings, run
from step_kernels.model.checkpoint import INDEX

SHARDS = 13


def write_first_release(folder: Path) -> Path:
    """The bundled model, as that upload was: its names, its exclude list, its holes."""
    run("bundled", folder, Settings(names="released"), verify=False)
    tensors, files = read(folder), [f"model-{i:05}-of-{SHARDS:05}.safetensors" for i in range(1, SHARDS + 1)]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    trunk = text["num_hidden_layers"]
    mtp = tuple(f"model.layers.{trunk + i}." for i in range(text["num_nextn_predict_layers"]))
    tensors = {name: t for name, t in tensors.items() if not name.startswith(mtp)}
    names = sorted(tensors)
    weight_map = {name: files[i * SHARDS // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    text |= {name: value[:trunk] for name, value in text.items() if isinstance(value, list) and len(value) > trunk}
    body, experts = "model.language_model.layers", sorted({int(n.split(".")[3]) for n in names if ".moe." in n})
    ignore = ["lm_head", *(f"{body}.{i}{'*' if i == 0 else '.*'}" for i in range(experts[0]))]
    ignore += [f"{body}.{i}.{part}" for i in experts for part in ("moe.gate", "self_attn*", "share_expert*")]
    ignore += ["model.vision_model*", "model.vit_large_projector"]
    config["quantization_config"]["ignore"] = ignore
    (folder / "config.json").write_text(json.dumps(config))
    other = json.loads((folder / "hf_quant_config.json").read_text())
    other["quantization"]["exclude_modules"] = ignore
    (folder / "hf_quant_config.json").write_text(json.dumps(other))
    return folder
