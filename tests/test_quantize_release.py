"""The plan for the released model, by shapes alone: its tensors, its exclude list, and how engines read that."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from small_checkpoint import PROJECTIONS, TEXT

from quantize import Settings
from quantize.layout import expert_shapes, tensor_shapes
from quantize.modelopt import is_excluded, released_name
from quantize.plan import make_plan
from step_kernels.model.checkpoint import Checkpoint, Entry
from step_kernels.model.config import StepConfig


def real_plan(names: str, **settings):
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
    return make_plan(checkpoint, Settings(names=names, **settings)), entries


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


@pytest.mark.parametrize("names", ["source", "released"])
def test_engines_matcher_excludes_every_linear_but_no_expert(names):
    plan, entries = real_plan(names)
    linears = [n for n, e in entries.items() if len(e.shape) == 2 and n.endswith("weight") and "embed_tokens" not in n]
    spell = (lambda n: n) if names == "source" else (lambda n: released_name(n, plan.config))
    modules = [re.sub(r"[._]weight$", "", spell(n)) for n in linears]
    assert len(modules) == 1 + 45 * 5 + 3 * 3 + 42 * 4 + 3 * (5 + 3 + 2) + 47 * 4 + 1
    assert [m for m in modules if not is_excluded(m, plan.patterns)] == []
    experts = [spell(f"model.layers.{i}.moe.experts") for i in range(3, 45)]
    assert [m for m in experts if is_excluded(m, plan.patterns)] == []
    # By globs alone, as TensorRT-LLM matches, the stacked tensors' own module names are not excluded either.
    stacks = [spell(f"model.layers.{i}.moe.{p}") for i in range(3, 45) for p in PROJECTIONS]
    assert [m for m in stacks if any(fnmatchcase(m, p) for p in plan.patterns)] == []


@pytest.mark.parametrize("names", ["source", "released"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_engines_matcher_excludes_exactly_what_the_linears_recipe_leaves_alone(names, lm_head):
    plan, entries = real_plan(names, recipe="linears", lm_head=lm_head)
    (shard,) = plan.shards.values()
    spell = (lambda n: n) if names == "source" else (lambda n: released_name(n, plan.config))
    linears = {spell(n): n for n, e in entries.items() if len(e.shape) == 2 and re.search(r"[._]weight$", n)}
    linears.pop(spell("model.embed_tokens.weight"))
    quantized = {n for n in linears if shard[n][0] == "U8"}
    assert len(quantized) == 45 * 4 + 45 * 3 + lm_head  # attention, then dense MLPs and share experts
    left = {linears[n] for n in linears.keys() - quantized if "vision" not in n and "vit_large" not in n}
    in_trunk = {re.sub(r"\d+", "N", n) for n in left if int((re.findall(r"\d+", n) or [0])[0]) < 45}
    gates = {"model.layers.N.self_attn.g_proj.weight", "model.layers.N.moe.gate.weight"}
    assert in_trunk == (gates if lm_head else {*gates, "lm_head.weight"})

    def engine(name):  # q, k, v and gate, up are fused; vLLM moves the share expert below moe
        module = re.sub(r"[._]weight$", "", name).replace(".share_expert.", ".moe.share_expert.")
        return re.sub(
            r"[qkv]_proj$", "qkv_proj", re.sub(r"(mlp|share_expert)\.(gate|up)_proj$", r"\1.gate_up_proj", module)
        )

    modules = {engine(n) for n in quantized} | {spell(f"model.layers.{i}.moe.experts") for i in range(3, 45)}
    assert len(modules) == 45 * 2 + 45 * 2 + lm_head + 42
    assert [m for m in modules if is_excluded(m, plan.patterns)] == []
    assert [m for m in map(engine, linears.keys() - quantized) if not is_excluded(m, plan.patterns)] == []


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


def test_matcher_takes_an_undotted_layer_number_for_ten_layers():
    modules = [f"model.layers.{i}.moe.experts" for i in range(20)]
    assert [is_excluded(m, ["model.layers.1*"]) for m in modules] == [i == 1 or i >= 10 for i in range(20)]
    assert [is_excluded(m, ["model.layers.1.*"]) for m in modules] == [i == 1 for i in range(20)]
