"""The checker on checkpoints whose linears are in NVFP4 too."""

import re
import shutil

import pytest
import torch
from test_quantize_verify_files import edit_patterns
from test_verify import edit_json, edit_shard, f32, overwrite, total_bytes

from quantize import Settings, run
from quantize.plan import resolve_source
from quantize.verify import main, verify
from step_kernels.model.checkpoint import INDEX, Checkpoint

TRUNK = Checkpoint(resolve_source("bundled")).config["text_config"]["num_hidden_layers"]
ATTENTION = "model.layers.4.self_attn."
Q, K = (f"{ATTENTION}{p}_proj.weight" for p in "qk")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "converted"
    errors = run("bundled", folder, Settings(recipe="linears", lm_head=True), verify=False).errors
    return folder, errors


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted[0], tmp_path / "copy")


def test_sound_linears_have_no_problem_and_their_errors_are_the_converters(converted, capsys):
    folder, errors = converted
    report = verify(folder, "bundled")
    assert report.findings.found == [] and set(report.measured.sums) == {p for _, p in errors.sums}
    for projection, sums in report.measured.sums.items():
        keys, stored = [key for key in errors.sums if key[1] == projection], sums["stored"] / sums["power"]
        assert 0.002 < stored < 0.009 and stored == sums["mse"] / sums["power"]  # of Gaussian weights 0.0066
        # Of these small linears all rows are measured, of routed experts 8 of 32; lm_head's parts overlap.
        assert stored == pytest.approx(errors.relative(keys), rel=0.02 if "moe" in projection else 3e-3)
    assert {key for key in errors.sums if "self_attn" in key[1]} == {
        (layer, f"self_attn.{p}_proj") for layer in range(TRUNK) for p in "qkvo"
    }
    assert main([str(folder), "--source", "bundled"]) == 0
    text = capsys.readouterr().out
    assert "\nlm_head  " in text and text.endswith(f"\n\n{folder}: verified\n")


@pytest.mark.parametrize(
    ("name", "at", "data", "wanted"),
    [
        (f"{Q}_scale", 5, b"\x00\x7f", f"{Q}_scale: block scales are zero, negative or NaN (2)"),
        (f"{Q}_scale_2", 0, f32(float("nan")), f"{Q}_scale_2: scales are not positive numbers (nan)"),
        (f"{ATTENTION}o_proj.input_scale", 0, f32(-1.0), "o_proj.input_scale: scales are not positive numbers (-1.0)"),
    ],
)
def test_bad_scale_of_a_linear_is_named(name, at, data, wanted, copy):
    overwrite(copy, name, at, data)
    assert any(p.endswith(wanted) for p in verify(copy).problems)


@pytest.mark.parametrize("name", [K, "model.layers.0.mlp.up_proj.weight"])
def test_smaller_scale_than_of_the_linears_fused_with_it_is_read_with_theirs(name, copy):
    scale = Checkpoint(copy).read(f"{name}_scale_2").item()
    overwrite(copy, f"{name}_scale_2", 0, f32(scale / 2))
    report = verify(copy)
    assert report.problems == [
        f"{name}_scale_2: differs from the largest it is computed with "
        "(ratio 2; misread: relative MSE 1.0000 against itself)"
    ]
    assert report.findings.found[0].effect == "vLLM and SGLang read all with the largest"
    overwrite(copy, f"{name}_scale_2", 0, f32(scale * 2))  # now the others are the smaller ones
    others = [p.partition(":")[0] for p in verify(copy).problems]
    fused = ("q_proj", "v_proj") if name == K else ("gate_proj",)
    assert others == [re.sub("[ku]p?_proj", f, f"{name}_scale_2") for f in fused]


def test_changed_codes_of_a_linear_are_measured(copy, converted):
    overwrite(copy, Q, 0, b"\x77" * 3200)
    report = verify(copy, "bundled")
    assert [f.where for f in report.findings.found] == [Q] and "above 0.0100" in report.problems[0]
    assert report.measured.worst["self_attn.q_proj"][1] == "layer 4 row 0"


def test_one_of_q_k_v_in_bfloat16_is_reported_since_engines_fuse_them(copy):
    n, k = Checkpoint(resolve_source("bundled")).entry(K).shape

    def edit(tensors):
        tensors[K] = torch.zeros(n, k, dtype=torch.bfloat16)
        for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{ATTENTION}k_proj.{suffix}"]

    edit_shard(copy, K, edit)
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        edit_json(copy / INDEX, lambda d, s=suffix: d["weight_map"].pop(f"{ATTENTION}k_proj.{s}"))
    edit_json(copy / INDEX, lambda d: d["metadata"].update(total_size=total_bytes(copy)))
    problems = verify(copy).problems
    assert f"{K}: is BF16 [{n}, {k}], wanted U8 [{n}, {k // 2}]" in problems
    assert f"{K}_scale: is missing" in problems and len(problems) == 4


@pytest.mark.parametrize("module", ["self_attn.g_proj", "moe.gate", "eh_proj"])
def test_linear_kept_in_bfloat16_by_every_recipe_is_no_nvfp4_tensor(module, copy):
    layer = TRUNK if module == "eh_proj" else 4
    name = f"model.layers.{layer}.{module}.weight"
    edit_shard(copy, name, lambda t: t.update({name: torch.zeros(t[name].shape[0], 32, dtype=torch.uint8)}))
    assert any(p.startswith(f"{name}: is U8 ") and "wanted BF16 or F16 or F32" in p for p in verify(copy).problems)


def test_pattern_that_matches_a_fused_name_of_the_engines_is_reported(copy):
    edit_patterns(copy, lambda patterns: patterns.append("*.4.self_attn.qkv_proj"))
    wanted = "language_model.model.layers.4.self_attn.qkv_proj: is excluded, but NVFP4 in the files"
    assert verify(copy).problems == [f"{wanted} (by *.4.self_attn.qkv_proj)"] * 2  # in vLLM and in SGLang
    edit_patterns(copy, lambda patterns: patterns.append("*.0.mlp.gate_up_proj"))
    wanted = "language_model.model.layers.0.mlp.gate_up_proj: is excluded, but NVFP4 in the files"
    assert verify(copy).problems.count(f"{wanted} (by *.0.mlp.gate_up_proj)") == 2


def test_pattern_missing_for_g_proj_is_reported_for_vllm_alone(copy):
    module = "model.layers.4.self_attn.g_proj"  # SGLang builds it, both build the router without asking the list
    edit_patterns(copy, lambda patterns: [patterns.remove(p) for p in list(patterns) if ".layers.4." in p])
    wanted = f"language_model.{module}: is not excluded, but not in NVFP4 in the files"
    report = verify(copy)
    assert report.problems == [wanted] and report.findings.found[0].effect.startswith("vLLM builds it in NVFP4")


def test_pattern_for_lm_head_is_wrong_where_lm_head_is_quantized(copy):
    edit_patterns(copy, lambda patterns: patterns.append("lm_head"))
    wanted = "language_model.lm_head: is excluded, but NVFP4 in the files (by lm_head)"
    assert verify(copy).problems == [wanted] * 2
