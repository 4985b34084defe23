"""Our replay of SGLang's exclude list, and its loader on our names, by SGLang's own code.

Only the functions asked for are run, out of the package's files: `pip install --no-deps sglang` is enough. Skipped
where those are not.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import importlib.util
import random
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from exclude_lists import answer, some_patterns, spellings
from test_quantize_release import real_plan

from quantize.engines import Excludes, modules
from quantize.serving import is_loadable
from step_kernels.model.checkpoint import DTYPES

_found = importlib.util.find_spec("sglang")
if _found is None or not _found.submodule_search_locations:
    pytest.skip("needs the files of the sglang package", allow_module_level=True)
SOURCE = Path(list(_found.submodule_search_locations)[0]) / "srt"


def run(file: str, names: set[str], known: dict, inside: str | None = None) -> dict:
    """Runs the definitions of `names` in a file, or in a class of it, with `known` in place of its imports."""
    body = ast.parse((SOURCE / file).read_text()).body
    if inside:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == inside).body
    chosen = []
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if names & {getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)}:
            chosen.append(node)
    assert len(chosen) == len(names), f"{file} of this SGLang has not all of {sorted(names)}"
    code = compile(ast.Module(chosen, []), file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, known)
    return known


@pytest.fixture(scope="module")
def sglang():
    """Its reading of exclude lists, its name mapper for Step-3.7, and the two models' loaders."""
    known = {"Mapping": Mapping, "MappingProxyType": MappingProxyType, "re": re, "lru_cache": lru_cache}
    known |= {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "List": list, "Optional": object}
    run("layers/quantization/utils.py", {"_module_path_match", "_FALLBACK_FUSED_SHARDS", "is_layer_skipped"}, known)
    run("layers/quantization/modelopt_quant.py", {"_compile_exclusion_pattern"}, known)
    methods = {"apply_weight_name_mapper", "is_layer_excluded"}
    run("layers/quantization/modelopt_quant.py", methods, known, "ModelOptQuantConfig")
    run("models/utils.py", {"WeightsMapper"}, known)
    run("models/step3p7.py", {"hf_to_sglang_mapper"}, known, "Step3p7ForConditionalGeneration")
    return SimpleNamespace(**known)


class Config(SimpleNamespace):
    """What ModelOptQuantConfig's methods read of it; `excludes` is what its _get_quant_method asks."""

    def excludes(self, sglang, module) -> bool:
        if module.name.endswith(".experts"):
            return sglang.is_layer_excluded(self, module.name)
        skipped = sglang.is_layer_skipped(module.name, self.exclude_modules, {})
        return skipped or sglang.is_layer_excluded(self, module.name)


@pytest.mark.parametrize("vision", [True, False])
def test_every_list_leaves_out_what_sglangs_config_leaves_out(vision, sglang):
    plan, _ = real_plan("source")
    config = plan.config if vision else dataclasses.replace(plan.config, vision=None)
    generator, asked, answers = random.Random(7), modules("SGLang", config), {True: 0, False: 0, "split": 0}
    for trial in range(300):
        patterns = plan.patterns if trial == 0 else some_patterns(config, plan.patterns, generator)
        theirs = Config(exclude_modules=patterns)
        if vision:
            sglang.apply_weight_name_mapper(theirs, sglang.hf_to_sglang_mapper)
        ours = Excludes("SGLang", patterns, vision)
        assert ours.mapped == theirs.exclude_modules
        for module in asked:
            wanted = answer(theirs.excludes, sglang, module)
            assert answer(ours.leaves_out, module) == wanted, (module.name, patterns)
            answers[wanted] += 1
    assert min(answers.values()) >= 5, answers  # each kind of answer was compared


@pytest.mark.parametrize("names", ["source", "released"])
@pytest.mark.parametrize("recipe", ["experts", "linears"])
def test_sglang_leaves_out_all_but_what_the_plan_quantizes(recipe, names):
    plan, _ = real_plan(names, recipe=recipe)
    quantized = {w for group in plan.groups for w in group.weights}
    rules, asked = Excludes("SGLang", plan.patterns, True), modules("SGLang", plan.config)
    assert [m.name for m in asked if rules.leaves_out(m) == (set(m.weights) <= quantized)] == []
    assert len([m for m in asked if not rules.leaves_out(m)]) == (42 if recipe == "experts" else 42 + 4 * 45)


class Parameter:
    """Takes what a loader gives it, and counts."""

    def __init__(self, elements: int):
        self.wanted, self.got = elements, 0

    def weight_loader(self, param, loaded, *args, shard_id=None, expert_id=None):
        self.got += loaded.numel()


def parameters(plan, names: dict[str, torch.Tensor]) -> dict[str, Parameter]:
    """SGLang's parameters for the trunk: fused q, k, v and gate, up; experts as w13 and w2."""
    fused = {r"\.[qkv]_proj\.": ".qkv_proj.", r"\.(gate|up)_proj\.": ".gate_up_proj."}
    elements: dict[str, int] = {}
    for name, tensor in names.items():
        name = name.replace("language_model.", "", 1)
        name = re.sub(r"\.moe\.(gate|up)_proj\.", ".moe.experts.w13_", name)
        name = name.replace(".moe.down_proj.", ".moe.experts.w2_")
        for pattern, new in fused.items():
            name = re.sub(pattern, new, name)
        elements[name] = elements.get(name, 0) + tensor.numel()
    return {name: Parameter(count) for name, count in elements.items()}


@pytest.mark.parametrize("names", ["source", "released"])
def test_sglangs_loader_fills_every_parameter_with_every_element(names, sglang):
    from collections.abc import Iterable

    plan, _ = real_plan(names)
    (shard,) = plan.shards.values()
    tensors = {n: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for n, (dtype, shape) in shard.items()}
    text = {n: t for n, t in tensors.items() if "vision_model" not in n and "vit_large_projector" not in n}
    skipped = {n for n in text if re.search(r"layers\.4[567]\.", n) or n.endswith((".k_scale", ".v_scale"))}
    wanted = parameters(plan, {n: t for n, t in text.items() if n not in skipped})
    known = {"Iterable": Iterable, "Tuple": tuple, "Optional": object, "torch": torch, "default_weight_loader": None}
    run("layers/moe/fused_moe_triton/layer.py", {"make_expert_params_mapping"}, known, "FusedMoE")
    known["FusedMoE"] = SimpleNamespace(
        make_expert_params_mapping=lambda **sizes: known["make_expert_params_mapping"].__func__(None, **sizes)
    )
    run("models/step3p5.py", {"load_weights"}, known, "Step3p5ForCausalLM")
    config = SimpleNamespace(moe_num_experts=288, num_hidden_layers=45, num_nextn_predict_layers=3)
    model = SimpleNamespace(config=config, num_fused_shared_experts=0, named_parameters=wanted.items)
    # Step-3.7's loader takes the prefix off before it hands the text model its tensors.
    known["load_weights"](model, ((n.replace("language_model.", "", 1), t) for n, t in text.items()))
    assert {n: p.got for n, p in wanted.items()} == {n: p.wanted for n, p in wanted.items()}
    assert sum(p.got for p in wanted.values()) == sum(t.numel() for n, t in text.items() if n not in skipped)
    assert len(skipped) == 90 + sum("layers.4" in n and re.search(r"layers\.4[567]\.", n) is not None for n in text)


def test_names_said_to_be_loadable_reach_sglangs_text_model_as_its_own():
    plan, _ = real_plan("source")
    names = ["lm_head.weight", "model.norm.weight", "model.layers.3.moe.up_proj.weight_scale_2"]
    spelt, reached = spellings(names), []
    known = run("models/step3p7.py", {"load_weights"}, {}, "Step3p7ForConditionalGeneration")
    text = SimpleNamespace(load_weights=lambda weights: reached.extend(name for name, _ in weights))
    model = SimpleNamespace(named_parameters=lambda **_: {}, language_model=text)
    known["load_weights"](model, [(stored, None) for stored, _ in spelt])
    loadable = [is_loadable(stored, name, plan.config) for stored, name in spelt]
    # It may reach a parameter from names that vLLM does not map, but not the other way round.
    assert all(got == name for ok, got, (_, name) in zip(loadable, reached, spelt) if ok) and len(reached) == len(spelt)
    assert loadable.count(True) == 2 + 3 + 3


def test_sglang_builds_its_quantized_modules_under_the_names_that_we_ask_for():
    found = {}
    for model in ast.parse((SOURCE / "models/step3p5.py").read_text()).body:
        for call in (node for node in ast.walk(model) if isinstance(node, ast.Call)):
            given = {k.arg: k.value for k in call.keywords}
            prefix, config = given.get("prefix"), given.get("quant_config")
            if isinstance(prefix, ast.Call) and isinstance(prefix.args[0], ast.Constant):
                quantized = config is not None and not isinstance(config, ast.Constant)
                found[f"{model.name}.{prefix.args[0].value}"] = quantized
    # The router's `gate` and `g_proj` get no config; the decoder layer calls both its MLP and its experts' block `mlp`.
    blocks = {"Step3p5DecoderLayer": ("self_attn", "mlp", "share_expert"), "Step3p5ForCausalLM": ("model", "lm_head")}
    leaves = {"Step3p5MLP": ("gate_up_proj", "down_proj"), "Step3p5MoEMLP": ("experts",)}
    leaves |= {"Step3p5Attention": ("qkv_proj", "o_proj"), "Step3p5Model": ("embed_tokens",)}
    wanted = {f"{model}.{name}" for model, names in (blocks | leaves).items() for name in names}
    assert {name for name, quantized in found.items() if quantized} == wanted
    others = {"Step3p5MoEMLP.gate", "Step3p5Attention.attn", "Step3p5Attention.g_proj", "Step3p5Model.layers"}
    assert found.keys() - wanted == others


def test_sglang_builds_neither_fp8_by_rows_nor_the_experts_beside_it(monkeypatch):
    """Why the card of such a checkpoint has no command for it."""
    plan, _ = real_plan("source", rest="fp8")
    classes = {name: type(name, (), {}) for name in ("LinearBase", "FusedMoE", "ParallelLMHead")}
    classes["VocabParallelEmbedding"] = classes["RadixAttention"] = type("Other", (), {})
    layers = ("linear", "moe.fused_moe_triton", "vocab_parallel_embedding", "radix_attention")
    for module in (
        "sglang.srt",
        "sglang.srt.layers",
        "sglang.srt.layers.moe",
        *(f"sglang.srt.layers.{n}" for n in layers),
    ):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**classes, __path__=[]))
    methods = {"get_quant_method", "_resolve_quant_algo", "_quantized_layer_prefix_candidates"}
    known = {"is_layer_skipped": lambda *_: False, "UnquantizedLinearMethod": lambda: "unquantized", **classes}
    run("layers/quantization/modelopt_quant.py", {"_BLOCK_FP8_ALGOS"}, known)
    run("layers/quantization/modelopt_quant.py", methods, known, "ModelOptMixedPrecisionConfig")
    config = type("Mixed", (), {name: known[name] for name in methods})()
    config.quantized_layers = plan.quantization["config.json"]["quantized_layers"]
    config.exclude_modules, config.packed_modules_mapping, config.kv_cache_quant_algo = [], None, None
    config.is_layer_excluded = lambda prefix: False
    linear, experts = classes["LinearBase"](), classes["FusedMoE"]()
    assert config._resolve_quant_algo("model.layers.4.self_attn.o_proj") == "FP8_PER_CHANNEL_PER_TOKEN"
    assert config.get_quant_method(linear, "model.layers.4.self_attn.o_proj") == "unquantized"
    assert config.get_quant_method(experts, "model.layers.4.mlp.experts") is None
