"""Our replay of vLLM's exclude list against vLLM's own code. Skipped where vLLM is not installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
import sys
from collections import Counter
from unittest.mock import MagicMock

import pytest
import torch
from exclude_lists import answer, some_patterns, spellings
from test_quantize_release import real_plan

pytest.importorskip("vllm")

import test_vllm_model  # noqa: E402
from test_vllm_layers import vllm_config  # noqa: E402, F401
from test_vllm_model import released  # noqa: E402, F401

from quantize.engines import Algorithms, Excludes, SplitModule, modules  # noqa: E402
from quantize.modelopt import ALGORITHMS  # noqa: E402
from quantize.serving import is_loadable  # noqa: E402
from step_kernels.integrations import vllm as plugin  # noqa: E402

# Beside FP8: in NVFP4 and left alone one group each of the trunk and of the layers that draft.
CHOSEN = {f"model.layers.{i}.self_attn.q_proj.weight": p for i, p in ((5, "nvfp4"), (6, "source"), (45, "nvfp4"))}
CHOSEN |= {"model.layers.2.mlp.down_proj.weight": "source", "model.layers.46.mlp.gate_proj.weight": "source"}
CHOSEN |= {"model.layers.7.share_expert.gate_proj.weight": "nvfp4", "lm_head.weight": "nvfp4"}


def mixed_plan(vision=True, names="source"):
    plan, _ = real_plan(names, rest="fp8", lm_head=True, mtp=True, precisions=CHOSEN)
    return plan if vision else dataclasses.replace(plan, config=dataclasses.replace(plan.config, vision=None))


def layers_of(plan):
    layers = plan.quantization["config.json"]["quantized_layers"]
    return {name: how["quant_algo"] for name, how in layers.items()}


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


def test_quantized_layers_build_what_vllms_config_builds(classes):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig
    from vllm.model_executor.model_loader.utils import configure_quant_config

    generator, algorithms = random.Random(3), ("NVFP4", "FP8_PER_CHANNEL_PER_TOKEN")
    for vision in (True, False):
        config, layers = mixed_plan(vision).config, layers_of(mixed_plan(vision))
        answers = Counter()
        for trial in range(60):
            if trial:  # some left out, some otherwise
                layers = {n: generator.choice(algorithms) if generator.random() < 0.1 else a for n, a in layers.items()}
                layers = {n: a for n, a in layers.items() if generator.random() < 0.98}
            given = {"quant_algo": "MIXED_PRECISION", "quant_method": "modelopt", "ignore": []}
            given["quantized_layers"] = {name: {"quant_algo": algorithm} for name, algorithm in layers.items()}
            trunk, draft = (ModelOptMixedPrecisionConfig.from_config(given) for _ in range(2))
            for model in classes if vision else classes[1:]:
                configure_quant_config(trunk, model)
            ours = Algorithms(layers, vision)
            for module in modules("vLLM", config):
                wanted = answer((draft if module.mtp else trunk)._resolve_quant_algo, module.name)
                assert answer(ours.of, module) == wanted, module.name
                answers[wanted] += 1
        assert {*algorithms, None, "split"} == set(answers) and min(answers.values()) > 20, answers


@later
@pytest.mark.parametrize("names", ["source", "released"])
def test_vllm_builds_each_module_in_the_precision_that_the_files_hold(names, classes, vllm_config):  # noqa: F811
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.model_loader.utils import configure_quant_config

    plan = mixed_plan(True, names)
    precisions = {w: group.precision for group in plan.groups for w in group.weights}
    given = plan.quantization["config.json"]
    assert modelopt.ModelOptMixedPrecisionConfig.override_quantization_method(given, "modelopt") == "modelopt_mixed"
    trunk, draft = (modelopt.ModelOptMixedPrecisionConfig.from_config(given) for _ in range(2))
    for model in classes:
        configure_quant_config(trunk, model)
    found = Counter()
    for module in modules("vLLM", plan.config):
        (wanted,) = {precisions.get(w, "source") for w in module.weights}
        found[wanted] += 1
        config = draft if module.mtp else trunk
        if module.name.endswith(".experts"):
            assert config._resolve_quant_algo(module.name) == "NVFP4" and not config.is_layer_excluded(module.name)
            continue
        method, spec = config.get_quant_method(LinearBase.__new__(LinearBase), module.name), None
        if wanted != "source":
            spec = modelopt.resolve(ALGORITHMS[wanted]["quant_algo"], trunk.nvfp4_config, "")[0]
        assert (type(method).__name__ == "UnquantizedLinearMethod") == (wanted == "source"), module.name
        assert getattr(method, "spec", None) == spec, module.name
    assert min(found.values()) > 30 and len(found) == 3, found


@pytest.fixture
def in_fp8(monkeypatch):
    """Has `released` store in FP8 all linears that can be, the experts aside; vLLM has no FP8 kernel for a CPU."""
    from vllm.model_executor.layers.quantization import modelopt

    monkeypatch.setattr(modelopt, "select_linear_kernel", MagicMock())
    monkeypatch.setattr(test_vllm_model, "real_plan", functools.partial(real_plan, rest="fp8", lm_head=True, mtp=True))


@later
@pytest.mark.parametrize(
    "copies_every_element",
    [
        test_vllm_model.test_vllms_model_copies_every_element_of_the_release_into_every_parameter,
        test_vllm_model.test_vllms_mtp_model_copies_every_element_of_its_layers_into_every_parameter,
    ],
    ids=["trunk", "drafts"],
)
@pytest.mark.parametrize("released", ["source", "released"], indirect=True)
def test_models_copy_every_element_of_a_checkpoint_in_fp8_into_every_parameter(
    in_fp8,
    released,  # noqa: F811
    copies_every_element,
    monkeypatch,
):
    codes = [n for n in released.tensors if f"{n}_scale" in released.tensors and ".moe." not in n]
    assert len(codes) == 48 * 7 + 4 and {released.tensors[n].dtype for n in codes} == {torch.float8_e4m3fn}
    copies_every_element(released, monkeypatch)


@pytest.mark.skipif(not is_old(), reason="of vLLM 0.25, which knows no FP8 by rows beside NVFP4")
def test_vllm_0_25_is_stopped_before_it_takes_fp8_codes_for_weights(classes, vllm_config):  # noqa: F811
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig

    given, layer = mixed_plan(False).quantization["config.json"], LinearBase.__new__(LinearBase)
    name = "model.layers.4.self_attn.o_proj"
    theirs = ModelOptMixedPrecisionConfig.from_config(given).get_quant_method(layer, name)
    assert isinstance(theirs, UnquantizedLinearMethod)
    with pytest.raises(ValueError, match=f"{name}: is FP8_PER_CHANNEL_PER_TOKEN in the checkpoint, which this vLLM"):
        plugin.config_classes()["modelopt_mixed"].from_config(given).get_quant_method(layer, name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recipe": "linears"},
        {"recipe": "linears", "lm_head": True, "mtp": True},
        {"rest": "fp8"},
        {"rest": "fp8", "lm_head": True, "mtp": True},
        {"rest": "fp8", "lm_head": True, "mtp": True, "precisions": CHOSEN},
    ],
)
def test_vllm_finds_a_scheme_of_compressed_tensors_for_exactly_what_is_quantized(settings):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    plan, _ = real_plan("source", format="compressed-tensors", **settings)
    config = CompressedTensorsConfig.from_config(plan.quantization["config.json"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.packed_modules_mapping |= {"gate_up_proj": ["gate_proj", "up_proj"]}
    classes = {name: type(name, (torch.nn.Module,), {}) for name in ("Linear", "ParallelLMHead", "RoutedExperts")}
    precisions = {w: group.precision for group in plan.groups for w in group.weights}
    for module in modules("vLLM", plan.config):
        names, kind = [module.name], "Linear"
        if module.name.endswith("experts"):
            names, kind = [f"{module.name}.0.{p}_proj" for p in ("gate", "up", "down")], "RoutedExperts"
            config._add_fused_moe_to_target_scheme_map()
        elif module.name.endswith(("lm_head", "shared_head.head")):
            kind = "ParallelLMHead"
        found = [config.get_scheme_dict(classes[kind](), name) for name in names]
        (wanted,) = {precisions.get(w, "source") for w in module.weights}
        bits = {"nvfp4": 4, "fp8": 8, "source": None}[wanted]
        assert [f and f["weights"].num_bits for f in found] == [bits] * len(names), module.name
        if wanted == "fp8":  # weights by rows, inputs by tokens without a stored scale
            assert config._is_fp8_w8a8(found[0]["weights"], found[0]["input_activations"])
            assert found[0]["format"] == "float-quantized" and found[0]["input_activations"].dynamic is True
    table = type("VocabParallelEmbedding", (torch.nn.Module,), {})()
    assert config.get_scheme_dict(table, "language_model.model.embed_tokens") is None
