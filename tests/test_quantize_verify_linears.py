"""The checker on checkpoints whose linears are in NVFP4 too."""

import shutil

import pytest
import torch
from test_verify import edit_json, edit_patterns, edit_shard, f32, overwrite, total_bytes

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


def test_sound_linears_have_no_problem_and_their_table_is_the_converters(converted, capsys):
    folder, errors = converted
    report = verify(folder, "bundled")
    assert report.problems == [] and list(report.errors.sums) == list(errors.sums)
    for key, sums in errors.sums.items():
        assert report.errors.sums[key] == pytest.approx(sums, rel=1e-12)
        assert 0.002 < errors.relative([key]) < 0.009  # of Gaussian weights 0.0066
    assert {key for key in errors.sums if "self_attn" in key[1]} == {
        (layer, f"self_attn.{p}_proj") for layer in range(TRUNK) for p in "qkvo"
    }
    assert (None, "lm_head") in errors.sums
    assert main([str(folder), "--source", "bundled"]) == 0
    assert capsys.readouterr().out == f"{errors.table()}\n{folder}: verified\n"


@pytest.mark.parametrize(
    ("name", "at", "data", "wanted"),
    [
        (f"{Q}_scale", 5, b"\x00\x7f", f"{Q}_scale: 2 block scales are zero, negative or NaN"),
        (f"{Q}_scale_2", 0, f32(float("nan")), f"{Q}_scale_2: is nan, wanted a positive number"),
        (f"{K}_scale_2", 0, f32(0.5), f"{K}_scale_2: is 0.5, wanted q_proj's "),
        ("model.layers.0.mlp.up_proj.weight_scale_2", 0, f32(0.5), "weight_scale_2: is 0.5, wanted gate_proj's "),
        (f"{ATTENTION}o_proj.input_scale", 0, f32(-1.0), "o_proj.input_scale: is -1.0, wanted a positive number"),
    ],
)
def test_bad_scale_of_a_linear_is_named(name, at, data, wanted, copy):
    overwrite(copy, name, at, data)
    assert any(p.startswith(wanted) or f".{wanted}" in p for p in verify(copy).problems)


def test_changed_code_of_a_linear_shows_in_the_error_table(copy, converted):
    overwrite(copy, Q, 0, b"\x77" * 32)
    report, key = verify(copy, "bundled"), (4, "self_attn.q_proj")
    assert report.problems == []
    assert report.errors.relative([key]) > converted[1].relative([key])


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
    wanted = "config.json: ignore matches model.layers.4.self_attn.qkv_proj, which is quantized"
    assert verify(copy).problems == [wanted] * 3  # of q, k and v
    edit_patterns(copy, lambda patterns: patterns.append("*.0.mlp.gate_up_proj"))
    wanted = "config.json: ignore matches model.layers.0.mlp.gate_up_proj, which is quantized"
    assert verify(copy).problems.count(wanted) == 2


@pytest.mark.parametrize("module", ["model.layers.4.self_attn.g_proj", "model.layers.4.moe.gate"])
def test_pattern_missing_for_g_proj_or_router_is_reported(module, copy):
    edit_patterns(copy, lambda patterns: patterns.remove(module))
    assert verify(copy).problems == [f"config.json: ignore does not match {module}, which is not quantized"]


def test_pattern_for_lm_head_is_wrong_where_lm_head_is_quantized(copy):
    edit_patterns(copy, lambda patterns: patterns.append("lm_head"))
    assert verify(copy).problems == ["config.json: ignore matches lm_head, which is quantized"]
