"""The plan for the released model, by shapes alone: its tensors, its exclude list, and how engines read that."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from small_checkpoint import PROJECTIONS, TEXT

from quantize import Settings
from quantize.engines import ENGINES, Excludes, modules
from quantize.layout import expert_shapes, tensor_shapes
from quantize.modelopt import layer_number, released_name
from quantize.plan import make_plan
from step_kernels.model.checkpoint import Checkpoint, Entry
from step_kernels.model.config import StepConfig


def real_plan(names: str, precisions=None, **settings):
    full, sliding = "full_attention", "sliding_attention"
    text = TEXT | {
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128896,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "layer_types": [full if i % 4 == 0 else sliding for i in range(48)],
        "sliding_window": 512,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
    }
    vision = {"image_size": 728, "patch_size": 14, "width": 1536, "layers": 47, "heads": 16}
    config = {"model_type": "step3p7", "image_token_id": 128001, "text_config": text, "vision_config": vision}
    parsed = StepConfig.from_dict(config)
    entries = {}
    for name, shape in (tensor_shapes(parsed) | expert_shapes(parsed)).items():
        dtype = torch.float32 if name.endswith("router_bias") else torch.bfloat16
        entries[name] = Entry(name, Path("model.safetensors"), dtype, shape, 0, 0)
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.folder, checkpoint.config, checkpoint.entries = Path("real"), config, entries
    return make_plan(checkpoint, Settings(names=names, **settings), precisions), entries


def elements(tensors) -> dict[str, int]:
    counts = {}
    for dtype, shape in tensors:
        counts[dtype] = counts.get(dtype, 0) + int(torch.Size(shape).numel())
    return counts


def test_real_plan_has_the_released_tensor_and_element_counts():
    plan, entries = real_plan("released")
    assert len(entries) == 1471
    assert elements((e.dtype, e.shape) for e in entries.values()) == {
        torch.bfloat16: 201_365_304_064,
        torch.float32: 12_096,
    }
    (shard,) = plan.shards.values()
    assert len(shard) == 1939
    assert elements(shard.values()) == {
        "U8": 95_126_814_720,
        "F8_E4M3": 11_890_851_840,
        "BF16": 11_111_674_624,
        "F32": 84_672 + 90,
    }
    assert shard["model.language_model.layers.44.moe.down_proj.weight_scale"] == ("F8_E4M3", (288, 4096, 80))


def test_real_plan_for_compressed_tensors_has_four_tensors_for_each_of_36288_matrices_of_experts():
    plan, _ = real_plan("source", format="compressed-tensors")
    stacked, _ = real_plan("source")
    (shard,), (other,) = plan.shards.values(), stacked.shards.values()
    experts = {name: of for name, of in shard.items() if ".moe.experts." in name}
    assert len(experts) == 145_152 == 4 * 36_288 and len(shard) == 145_152 + 1939 - 504
    assert elements(shard.values()) == elements(other.values())
    name = "model.layers.44.moe.experts.287.down_proj."
    assert shard[f"{name}weight_packed"] == ("U8", (4096, 640))
    assert shard[f"{name}weight_scale"] == ("F8_E4M3", (4096, 80))
    assert shard[f"{name}weight_global_scale"] == shard[f"{name}input_global_scale"] == ("F32", (1,))


def released_ignore() -> list[str]:
    body = "model.language_model.layers"
    moe = [f"{body}.{i}.{p}" for i in range(3, 45) for p in ("moe.gate", "self_attn*", "share_expert*")]
    mtp = [f"{prefix}.{i}.*" for prefix in (body, "model.layers") for i in (45, 46, 47)]
    vision = ["model.vision_model*", "model.vit_large_projector"]
    return ["lm_head", f"{body}.0*", f"{body}.1.*", f"{body}.2.*", *moe, *vision, *mtp]


def test_exclude_list_holds_the_releases_138_patterns():
    plan, _ = real_plan("source")
    released = released_ignore()
    assert len(released) == 138
    # Two are spelt otherwise here: a dot behind every layer number, and what lies below the projector too.
    respelt = {"model.language_model.layers.0*": "model.language_model.layers.0.*"}
    respelt["model.vit_large_projector"] = "model.vit_large_projector*"
    assert {respelt.get(p, p) for p in released} <= set(plan.patterns)


def built_quantized(engine: str, plan) -> set[str]:
    """The weights, but the experts', that an engine would build in NVFP4 by the plan's exclude list."""
    rules = Excludes(engine, plan.patterns, True)
    return {w for m in modules(engine, plan.config) if not rules.leaves_out(m) for w in m.weights if ".moe." not in w}


@pytest.mark.parametrize("names", ["source", "released"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_exclude_every_linear_but_no_expert(engine, names):
    plan, _ = real_plan(names)
    assert built_quantized(engine, plan) == set()
    rules = Excludes(engine, plan.patterns, True)
    experts = [m for m in modules(engine, plan.config) if m.name.endswith(".experts")]
    assert len(experts) == 42 and not any(rules.leaves_out(m) for m in experts)
    # By globs alone, as TensorRT-LLM matches, the stacked tensors' own module names are not excluded either.
    spell = (lambda n: n) if names == "source" else (lambda n: released_name(n, plan.config))
    stacks = [spell(f"model.layers.{i}.moe.{p}") for i in range(3, 45) for p in PROJECTIONS]
    assert [m for m in stacks if any(fnmatchcase(m, p) for p in plan.patterns)] == []


@pytest.mark.parametrize("names", ["source", "released"])
@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("recipe", ["linears", "experts"])
def test_engines_exclude_exactly_what_the_recipe_leaves_alone(names, lm_head, mtp, recipe):
    if recipe == "experts" and lm_head:
        return  # refused
    plan, entries = real_plan(names, recipe=recipe, lm_head=lm_head, mtp=mtp)
    quantized = {w for group in plan.groups for w in group.weights if ".moe." not in w}
    assert len(quantized) == (recipe == "linears") * 45 * 7 + lm_head + mtp * 3 * (7 + lm_head)
    trunk = {n for n in quantized if (layer_number(n) or 0) < 45}
    assert built_quantized("vLLM", plan) == quantized and built_quantized("SGLang", plan) == trunk
    left = {n for n, e in entries.items() if len(e.shape) == 2 and n.endswith(".weight")} - quantized
    kinds = {re.sub(r"\d+", "N", n) for n in left if not n.startswith("vi") and (layer_number(n) or 0) < 45}
    small = {"model.layers.N.self_attn.g_proj.weight", "model.layers.N.moe.gate.weight", "model.embed_tokens.weight"}
    if recipe == "linears":
        assert kinds == (small if lm_head else {*small, "lm_head.weight"})
    if mtp:
        drafts = {re.sub(r".*layers\.\d+\.", "", n) for n in left if (layer_number(n) or 0) >= 45}
        head = set() if lm_head else {"transformer.shared_head.output.weight"}
        assert drafts == {"self_attn.g_proj.weight", "eh_proj.weight", *head}


def test_linears_recipe_stores_trunk_but_mtp_and_vision_at_four_and_a_half_bits():
    plan, entries = real_plan("source", recipe="linears")
    (shard,) = plan.shards.values()
    # 4,520,815,872 of attention less 45 g_proj, 415,236,096 of dense MLPs, 660,602,880 of share experts.
    gates = sum(e.shape[0] * 4096 for n, e in entries.items() if "self_attn.g_proj" in n and int(n.split(".")[2]) < 45)
    linears = 4_520_815_872 - gates - 45 * 2 * 128 + 415_236_096 + 660_602_880
    found, experts = elements(shard.values()), 190_253_629_440
    assert found["U8"] == (experts + linears) // 2 and found["F8_E4M3"] == (experts + linears) // 16
    assert found["BF16"] == 11_111_674_624 - linears
    assert shard["model.layers.1.self_attn.q_proj.weight_scale"] == ("F8_E4M3", (96 * 128, 256))
