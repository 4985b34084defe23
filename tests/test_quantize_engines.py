"""How vLLM and SGLang read exclude lists, by our replay of their rules; their own code is in the *_rules tests."""

from __future__ import annotations

import dataclasses

import pytest
from test_quantize_release import real_plan, released_ignore

from quantize.engines import ENGINES, Excludes, Module, SplitModule, compressed_tensors_excludes, modules

PREFIX = "language_model.model.layers"


@pytest.fixture(scope="module")
def config():
    return real_plan("source")[0].config


def left_out(engine: str, patterns: list[str], config) -> list[str]:
    rules = Excludes(engine, patterns, config.vision is not None)
    return [m.name for m in modules(engine, config) if rules.leaves_out(m)]


def test_released_list_leaves_out_all_but_the_routed_experts_in_both_engines(config):
    for engine, experts in (("vLLM", "moe.experts"), ("SGLang", "mlp.experts")):
        every = [m.name for m in modules(engine, config)]
        quantized = [f"{PREFIX}.{i}.{experts}" for i in range(3, 45)]
        left = set(left_out(engine, released_ignore(), config))
        assert [n for n in every if n not in left] == quantized
    assert len(every) == 1 + 45 * 4 + 42  # no g_proj and no MTP layers in SGLang's list


def test_lists_without_the_mtp_layers_own_prefix_have_vllms_draft_model_quantized(config):
    patterns = [p for p in released_ignore() if not p.startswith("model.layers.4")]
    left = set(left_out("vLLM", patterns, config))
    found = [m for m in modules("vLLM", config) if m.mtp and m.name not in left]
    assert len(found) == 18 and found[-1].name == "model.layers.47.shared_head.head"


@pytest.mark.parametrize("engine", ENGINES)
def test_undotted_layer_number_takes_ten_more(engine, config):
    experts = "moe.experts" if engine == "vLLM" else "mlp.experts"
    taken = [f"{PREFIX}.{i}.{experts}" for i in range(10, 20)]
    assert [n for n in left_out(engine, ["model.layers.1*"], config) if n.endswith("experts")] == taken
    assert not any(n.endswith("experts") for n in left_out(engine, ["model.layers.1.*"], config))
    # vLLM finds a name without a star anywhere in a module's, SGLang only as whole parts of it.
    bare = [n for n in left_out(engine, ["model.layers.1"], config) if n.endswith("experts")]
    assert bare == (taken if engine == "vLLM" else [])


def test_router_patterns_do_not_touch_the_experts_of_either_engine(config):
    for engine in ENGINES:
        for pattern in ("model.layers.3.moe.gate", "model.layers.3.moe.gate*"):
            assert left_out(engine, [pattern], config) == []


def test_vllm_needs_a_star_or_the_whole_name_for_a_share_expert(config):
    layer = "model.layers.3.share_expert"
    inner = [f"{PREFIX}.3.moe.share_expert.{p}" for p in ("gate_up_proj", "down_proj")]
    assert left_out("vLLM", [layer], config) == []  # it calls that one moe.share_expert
    for patterns in ([f"{layer}*"], [f"{layer}.*"], [f"{layer}.{p}_proj" for p in ("gate", "up", "down")]):
        assert left_out("vLLM", patterns, config) == inner
    assert left_out("SGLang", [layer], config) == [name.replace(".moe.", ".") for name in inner]


def test_one_of_three_fused_projections_is_refused_by_both_engines(config):
    for engine in ENGINES:
        with pytest.raises(SplitModule):
            left_out(engine, ["model.layers.3.self_attn.k_proj"], config)
        names = [f"model.layers.3.self_attn.{p}_proj" for p in "qkv"]
        assert left_out(engine, names, config) == [f"{PREFIX}.3.self_attn.qkv_proj"]


def test_culprit_is_the_pattern_that_does_it_alone(config):
    module = Module(f"{PREFIX}.12.moe.experts", ())
    assert (
        Excludes("vLLM", ["lm_head", "model.layers.2*", "model.layers.1*"], True).culprit(module) == "model.layers.1*"
    )


def test_text_models_modules_have_no_prefix(config):
    text = dataclasses.replace(config, vision=None)
    assert modules("vLLM", text)[1].name == "model.layers.0.self_attn.qkv_proj"
    assert left_out("SGLang", ["model.layers.0.mlp*"], text) == [
        f"model.layers.0.mlp.{p}_proj" for p in ("gate_up", "down")
    ]


def test_compressed_tensors_patterns_are_whole_names_or_expressions():
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    names = ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.11.moe.gate", "model.layers.11.moe.gate_proj"]
    patterns = [
        "lm_head",
        "lm",
        "model.layers.1",
        "re:.*layers.1",
        r"re:.*\.mlp\.",
        r"re:.*moe\.gate$",
        "re:gate",
        "*gate",
    ]
    found = {(n, p): compressed_tensors_excludes(n, [p]) for n in names for p in patterns}
    assert found == {(n, p): match_name(n, p) for n in names for p in patterns}
    assert sum(found.values()) == 6
