"""The checker on headers, index, config files and exclude lists, and on the first NVFP4 upload."""

import json
import re
import shutil

import pytest
import torch
from first_release import write_first_release
from safetensors.torch import save_file
from small_checkpoint import read
from test_verify import GATE, UP, drop, edit_json, edit_shard, fault, overwrite, printed, total_bytes

from quantize import run
from quantize.plan import resolve_source
from quantize.verify import main, verify
from step_kernels.model.checkpoint import INDEX, Checkpoint


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "converted"
    run("bundled", folder, verify=False)
    return folder


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "edit", "wanted"),
    [
        (GATE, lambda t: t.update({GATE: t[GATE].to(torch.int32)}), f"{GATE}: is I32 [32, 64, 96], wanted U8"),
        (
            f"{GATE}_scale",
            lambda t: t.update({f"{GATE}_scale": t[f"{GATE}_scale"][:, :-1].clone()}),
            f"{GATE}_scale: is F8_E4M3 [32, 63, 12], wanted F8_E4M3 [32, 64, 12]",
        ),
        (
            "model.norm.weight",
            lambda t: t.update({"model.extra": torch.ones(1)}),
            "model.extra: is no tensor of this model",
        ),
        (
            "model.norm.weight",
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.uint8)}),
            "model.norm.weight: is U8 [192], wanted BF16 or F16 or F32",
        ),
    ],
)
def test_wrong_type_shape_or_name_is_reported(name, edit, wanted, copy):
    edit_shard(copy, name, edit)
    assert any(p.startswith(wanted) for p in verify(copy).problems)


@pytest.mark.parametrize("name", [f"{GATE}_scale_2", f"{GATE[:-6]}input_scale", "model.layers.5.moe.router_bias"])
def test_missing_tensor_is_reported_whether_the_index_lists_it_or_not(name, copy, capsys):
    edit_shard(copy, name, lambda t: t.pop(name))
    assert f"{name}: is missing, but {INDEX} lists it" in verify(copy).problems
    edit_json(copy / INDEX, lambda d: d["weight_map"].pop(name))
    edit_json(copy / INDEX, lambda d: d["metadata"].update(total_size=total_bytes(copy)))
    for source in (None, "bundled"):
        assert verify(copy, source, errors=False).problems == [f"{name}: is missing"]
    _, engines = fault(printed(capsys, 1, copy), "is missing")
    assert engines.endswith("uninitialised memory, NaN or empty answers; SGLang stops")


def test_weights_alone_in_nvfp4_need_no_input_scale(copy, capsys):
    names = [n for n in Checkpoint(copy).entries if n.endswith("input_scale")]
    drop(copy, names)
    lines = printed(capsys, 1, copy)
    assert fault(lines, "is missing")[0].endswith("is missing, 15 times:") and "           and 12 more" in lines
    edit_json(
        copy / "config.json",
        lambda d: d["quantization_config"]["config_groups"]["group_0"].update(input_activations=None),
    )
    line, engines = fault(printed(capsys, 0, copy), "quant_algo is NVFP4 with weights alone")
    assert line.startswith("unusual g") and "W4A16_NVFP4" in engines


def test_mtp_layer_that_config_announces_is_missed_unless_the_source_lacks_it_too(copy, tmp_path):
    drop(copy, [n for n in Checkpoint(copy).entries if n.startswith("model.layers.10.")])
    missing = "model.layers.10: MTP layers that config.json announces have no tensors"
    assert verify(copy).problems == verify(copy, "bundled", errors=False).problems == [missing]
    source = shutil.copytree(resolve_source("bundled"), tmp_path / "source")
    tensors = {n: t for n, t in read(source).items() if not n.startswith("model.layers.10.")}
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / INDEX).unlink(missing_ok=True)
    save_file(tensors, source / "model.safetensors")
    report = verify(copy, source, errors=False)
    assert report.problems == [] and [str(f) for f in report.findings.found] == [missing]


def test_index_faults_are_reported(copy):
    name = "lm_head.weight"
    file = Checkpoint(copy).entry(name).file.name
    edit_json(copy / INDEX, lambda d: (d["weight_map"].pop(name), d["metadata"].update(total_size=7)))
    wanted = [f"{name}: is not in {INDEX} ({file})", f"{INDEX}: total_size is 7, wanted {total_bytes(copy)}"]
    assert verify(copy).problems == wanted
    (copy / INDEX).unlink()
    assert verify(copy).problems == [f"{INDEX}: not found"]


def test_truncated_and_missing_shards_are_named_and_the_rest_is_still_checked(copy, capsys):
    overwrite(copy, f"{UP}_scale", 5, b"\x00")
    held = Checkpoint(copy).entry(f"{UP}_scale").file
    cut, gone = [file for file in sorted(copy.glob("*.safetensors")) if file != held][:2]
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    lines = printed(capsys, 1, copy)
    assert any(f"the file has {size - 1} (truncated?): {cut.name}" in line for line in lines)
    line, _ = fault(lines, "not found, but")
    assert re.search(rf": {gone.name} \(\d+ tensors\)$", line)
    assert fault(lines, "block scales are")[0].endswith("(expert 0: 1)")


def edit_patterns(folder, edit) -> None:
    edit_json(folder / "config.json", lambda d: edit(d["quantization_config"]["ignore"]))
    edit_json(folder / "hf_quant_config.json", lambda d: edit(d["quantization"]["exclude_modules"]))


def test_undotted_layer_number_takes_ten_layers_more(copy, capsys):
    edit_patterns(copy, lambda patterns: patterns.append("model.layers.4*"))
    lines = printed(capsys, 1, copy)
    groups = [line for line in lines if line.startswith("FAILED  d")]
    assert groups == [
        f"FAILED  d  is excluded, but NVFP4 in the files: language_model.model.layers.4.{experts} (by model.layers.4*)"
        for experts in ("moe.experts", "mlp.experts")  # as vLLM, and as SGLang calls them
    ]
    assert "           -> vLLM builds it in BF16 and cannot load it" in lines
    assert "           -> SGLang builds it in BF16 and cannot load it" in lines


def test_starred_router_matches_gate_proj_by_glob_alone(copy, capsys):
    edit_patterns(copy, lambda patterns: patterns.append("model.layers.4.moe.gate*"))
    line, engines = fault(printed(capsys, 0, copy), "matches experts' own names as a glob")
    assert line.endswith(": model.layers.4.moe.gate* (model.layers.4.moe.gate_proj)")
    assert line.startswith("unusual d") and engines.startswith("-> harmless in vLLM and SGLang")


def test_linear_that_no_pattern_matches_is_reported(copy, capsys):
    edit_patterns(copy, lambda patterns: [patterns.remove(p) for p in list(patterns) if ".layers.1." in p])
    problems = verify(copy).problems
    assert len(problems) == 9  # vLLM's qkv, o, g, gate_up and down; SGLang has no g_proj to quantize
    assert "language_model.model.layers.1.self_attn.g_proj: is not excluded, but not in NVFP4 in the files" in problems
    assert "vLLM builds it in NVFP4 and finds no scales" in "\n".join(printed(capsys, 1, copy))


def test_some_but_not_all_of_q_k_v_excluded_stops_engines(copy):
    def edit(patterns):
        patterns[:] = [p for p in patterns if ".layers.1." not in p]
        patterns += ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp*", "model.layers.1.self_attn.[og]_proj"]

    edit_patterns(copy, edit)
    split = "language_model.model.layers.1.self_attn.qkv_proj: some but not all of its weights are excluded"
    assert verify(copy).problems.count(split) == 2


def test_metadata_files_that_disagree_are_reported(copy):
    def edit(data):
        data["quantization"]["exclude_modules"].pop()
        data["quantization"]["kv_cache_quant_algo"] = None
        data["quantization"]["group_size"] = 128

    edit_json(copy / "hf_quant_config.json", edit)
    assert verify(copy).problems == [
        "hf_quant_config.json: group_size is 128, wanted 16",
        "hf_quant_config.json: exclude_modules differs from config.json's",
        "hf_quant_config.json: kv_cache_quant_algo differs from config.json's",
    ]
    edit_json(copy / "config.json", lambda d: d["quantization_config"].update(quant_algo="NVFP4_AWQ"))
    assert "config.json: quant_algo is NVFP4_AWQ, wanted NVFP4 or W4A16_NVFP4" in verify(copy).problems


def test_one_config_file_of_two_is_unusual_and_none_is_a_failure(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "hf_quant_config.json").rename(copy / "aside")
    line, engines = fault(printed(capsys, 0, copy), "not found")
    assert line == "unusual g  not found: hf_quant_config.json" and "TensorRT-LLM wants" in engines
    (copy / "aside").rename(copy / "hf_quant_config.json")
    edit_json(copy / "config.json", lambda d: d.pop("quantization_config"))
    assert fault(printed(capsys, 0, copy), "has no quantization_config")[0].startswith("unusual g")
    (copy / "hf_quant_config.json").unlink()
    assert (
        "config.json: neither it nor hf_quant_config.json says how the weights are quantized" in verify(copy).problems
    )
    config["quantization_config"]["quant_method"] = "compressed-tensors"
    (copy / "config.json").write_text(json.dumps(config))
    wanted = "config.json: quant_method is compressed-tensors, but the tensors are those of modelopt"
    assert verify(copy).problems == [wanted]


def test_half_written_or_unreadable_folder_is_said_and_exit_1(copy, tmp_path, capsys):
    part = copy / "model-00002-of-00004.safetensors.part"
    part.write_bytes(b"")
    line, engines = fault(printed(capsys, 1, copy), "a file half written")
    assert line.endswith(part.name) and "--resume" in engines
    part.unlink()
    for arguments in ((tmp_path / "none",), (copy, "--source", tmp_path / "none")):
        assert main([str(a) for a in arguments]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "not a folder" in text
    (copy / "config.json").write_text("{")
    assert main([str(copy)]) == 1
    assert "not readable as JSON" in capsys.readouterr().err


def test_first_release_lacks_mtp_and_the_ends_of_its_lists_and_nothing_else(tmp_path, capsys):
    folder = write_first_release(tmp_path / "first")
    entries = "list has 8 entries for 11 layers, MTP included"
    faults = [
        "FAILED  g  MTP layers that config.json announces have no tensors: model.layers.8-10",
        "           -> answers come without it; vLLM and SGLang fail when asked for speculative decoding by MTP",
        f"FAILED  g  {entries}, 3 times: layer_types, rope_theta, partial_rotary_factors",
        "           -> vLLM and SGLang look up the MTP layers' entries: IndexError when MTP is asked for",
        f"FAILED  g  {entries}, 2 times: swiglu_limits, swiglu_limits_shared",
        "           -> SGLang looks up the MTP layers' entries: IndexError when MTP is asked for",
    ]
    assert printed(capsys, 1, folder) == [
        "a  headers   ok           236 tensors, 9.94 MB in 13 files, and index",
        "b  scales    ok           480 global scales, all of 0.37 MB of block scales",
        "c  copies    not checked  no --source to compare with",
        "d  excludes  ok           21 patterns on 46 modules of vLLM and 38 modules of SGLang",
        "e  error     not checked  no --source to compare with",
        "g  loaders   FAILED (6)   config files, names; layout: modelopt, stacked",
        "f, h, i, j   not checked  decoders, logits, resuming and memory are properties of programs, not of files",
        "",
        *faults,
        "",
        f"{folder}: 6 problems",
    ]
    assert [line for line in printed(capsys, 1, folder, "--source", "bundled") if line in faults] == faults


def test_names_that_no_engine_maps_are_reported(copy, capsys):
    name = "model.layers.9.eh_proj.weight"
    edit_shard(copy, name, lambda t: t.update({name.replace("model.", "model.language_model."): t.pop(name)}))
    text = (copy / INDEX).read_text().replace(f'"{name}"', f'"{name.replace("model.", "model.language_model.")}"')
    (copy / INDEX).write_text(text)
    line, engines = fault(printed(capsys, 1, copy), "is spelt as no engine spells it")
    assert line.endswith(": model.language_model.layers.9.eh_proj.weight") and "skips it" in engines
