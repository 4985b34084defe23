"""Our replay of vLLM's exclude list against vLLM's own code. Skipped where vLLM is not installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
import sys
from unittest.mock import MagicMock

import pytest
import torch
from exclude_lists import answer, some_patterns, spellings
from test_quantize_release import real_plan

pytest.importorskip("vllm")

import test_vllm_model  # noqa: E402
from test_vllm_layers import vllm_config  # noqa: E402, F401
from test_vllm_model import released  # noqa: E402, F401

from quantize.engines import Excludes, SplitModule, modules  # noqa: E402
from quantize.serving import is_loadable  # noqa: E402


def is_old():
    from vllm.model_executor.models.utils import WeightsMapper

    return not hasattr(WeightsMapper, "map_name")


later = pytest.mark.skipif(is_old(), reason="vLLM 0.25 maps names otherwise and builds the drafts' heads plain")


@pytest.fixture
def classes(monkeypatch):
    """vLLM's Step-3.7 and Step-3.5 models."""
    from vllm.model_executor.models.step3p5 import Step3p5ForCausalLM

    if importlib.util.find_spec("torchvision") is None:  # its image processor asks for it, its model does not
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            monkeypatch.setitem(sys.modules, name, MagicMock())
    from vllm.model_executor.models.step3p7 import Step3p7ForConditionalGeneration

    return Step3p7ForConditionalGeneration, Step3p5ForCausalLM


@pytest.mark.parametrize("vision", [True, False])
def test_every_list_leaves_out_what_vllms_config_leaves_out(vision, classes):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.model_loader.utils import configure_quant_config

    plan, _ = real_plan("source")
    config = plan.config if vision else dataclasses.replace(plan.config, vision=None)
    generator, asked, answers = random.Random(7), modules("vLLM", config), {True: 0, False: 0, "split": 0}
    for trial in range(300):
        patterns = plan.patterns if trial == 0 else some_patterns(config, plan.patterns, generator)
        theirs, draft = (ModelOptNvFp4Config("NVFP4", True, None, list(patterns), 16) for _ in range(2))
        for model in classes if vision else classes[1:]:
            configure_quant_config(theirs, model)
        ours = Excludes("vLLM", patterns, vision)
        assert ours.mapped == theirs.exclude_modules
        for module in asked:
            wanted = answer((draft if module.mtp else theirs).is_layer_excluded, module.name)
            assert answer(ours.leaves_out, module) == wanted, (module.name, patterns)
            answers[wanted] += 1
    assert min(answers.values()) >= 5, answers  # each kind of answer was compared


@pytest.mark.parametrize("released", ["source"], indirect=True)
def test_vllms_model_asks_for_the_modules_that_we_name(released, classes, monkeypatch):  # noqa: F811
    from vllm.model_executor.layers.quantization.modelopt import ModelOptQuantConfigBase
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models import step3p7

    asked, original = {}, ModelOptQuantConfigBase.is_layer_excluded

    def noted(config, prefix):
        asked[prefix] = original(config, prefix)
        return asked[prefix]

    def text_model(vllm_config, hf_config, prefix):  # noqa: F811
        monkeypatch.setattr(vllm_config.model_config, "hf_config", hf_config)
        configure_quant_config(vllm_config.quant_config, classes[1])
        return classes[1](vllm_config=vllm_config, prefix=prefix)

    monkeypatch.setattr(ModelOptQuantConfigBase, "is_layer_excluded", noted)
    monkeypatch.setattr(step3p7, "init_vllm_registered_model", text_model)
    configure_quant_config(released.config.quant_config, classes[0])
    with torch.device("meta"):
        classes[0](vllm_config=released.config)
    plan, _ = real_plan("source")
    rules = Excludes("vLLM", plan.patterns, True)
    wanted = {m.name: rules.leaves_out(m) for m in modules("vLLM", plan.config) if not m.mtp}
    # Attention itself, the embedding and the vision encoder are asked about too, but never quantized.
    other = ("vision_model", "vit_large_projector", "embed_tokens", ".attn")
    found = {name: out for name, out in asked.items() if not any(o in name for o in other)}
    assert found == wanted and sum(wanted.values()) == len(wanted) - 42


def test_the_draft_model_asks_for_its_modules_under_the_files_own_prefix(classes):
    plan, _ = real_plan("released")
    mtp = [m for m in modules("vLLM", plan.config) if m.mtp]
    assert len(mtp) == 3 * 6 and mtp[0].name == "model.layers.45.mtp_block.self_attn.qkv_proj"
    only_released = [p for p in plan.patterns if p.startswith("model.language_model.")]
    assert not any(Excludes("vLLM", only_released, True).leaves_out(m) for m in mtp)
    assert all(Excludes("vLLM", plan.patterns, True).leaves_out(m) for m in mtp)


def test_split_projections_raise_as_in_vllm():
    plan, _ = real_plan("source")
    qkv = next(m for m in modules("vLLM", plan.config) if m.name.endswith("layers.4.self_attn.qkv_proj"))
    with pytest.raises(SplitModule):
        Excludes("vLLM", ["model.layers.4.self_attn.q_proj"], True).leaves_out(qkv)


@later
def test_names_said_to_be_loadable_are_those_that_vllm_maps_to_their_parameters(classes):
    plan, _ = real_plan("source")
    names = ["lm_head.weight", "model.norm.weight", "model.layers.3.moe.up_proj.weight_scale_2"]
    names += ["vision_model.conv1.weight", "vit_large_projector.weight"]
    found = {}
    for stored, name in spellings(names):
        parameter = name if name.startswith("vi") else f"language_model.{name}"
        found[stored] = classes[0].hf_to_vllm_mapper.map_name(stored) == parameter
        assert is_loadable(stored, name, plan.config) == found[stored], stored
    assert found["model.language_model.norm.weight"] and not found["model.lm_head.weight"]
    text = dataclasses.replace(plan.config, vision=None)
    assert [s for s, n in spellings(names[:3]) if is_loadable(s, n, text)] == names[:3]


@pytest.fixture
def drafts_too(monkeypatch):
    """Has `released` convert the MTP layers and all heads as well."""
    monkeypatch.setattr(
        test_vllm_model, "real_plan", functools.partial(real_plan, recipe="linears", lm_head=True, mtp=True)
    )


@later
@pytest.mark.parametrize("released", ["source", "released"], indirect=True)
def test_draft_model_copies_every_element_of_quantized_mtp_layers_into_every_parameter(
    drafts_too,
    released,  # noqa: F811
    monkeypatch,
):
    packed = [n for n, t in released.tensors.items() if t.dtype == torch.uint8 and test_vllm_model.is_mtp(n)]
    assert len(packed) == 3 * (4 + 3 + 1)
    test_vllm_model.test_vllms_mtp_model_copies_every_element_of_its_layers_into_every_parameter(released, monkeypatch)


@pytest.mark.parametrize("settings", [{}, {"recipe": "linears"}, {"recipe": "linears", "lm_head": True, "mtp": True}])
def test_vllm_finds_a_scheme_of_compressed_tensors_for_exactly_what_is_quantized(settings):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    plan, _ = real_plan("source", format="compressed-tensors", **settings)
    config = CompressedTensorsConfig.from_config(plan.quantization["config.json"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.packed_modules_mapping |= {"gate_up_proj": ["gate_proj", "up_proj"]}
    classes = {name: type(name, (torch.nn.Module,), {}) for name in ("Linear", "ParallelLMHead", "RoutedExperts")}
    quantized = {w for group in plan.groups for w in group.weights}
    for module in modules("vLLM", plan.config):
        names, kind = [module.name], "Linear"
        if module.name.endswith("experts"):
            names, kind = [f"{module.name}.0.{p}_proj" for p in ("gate", "up", "down")], "RoutedExperts"
            config._add_fused_moe_to_target_scheme_map()
        elif module.name.endswith(("lm_head", "shared_head.head")):
            kind = "ParallelLMHead"
        found = [config.get_scheme_dict(classes[kind](), name) is not None for name in names]
        assert found == [module.weights[0] in quantized] * len(names), module.name
    table = type("VocabParallelEmbedding", (torch.nn.Module,), {})()
    assert config.get_scheme_dict(table, "language_model.model.embed_tokens") is None
