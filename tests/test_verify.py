"""The checker: a sound checkpoint passes; each single fault is found and named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import run
from quantize.verify import main, verify
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError

GATE = "model.layers.3.moe.gate_proj.weight"
UP = "model.layers.3.moe.up_proj.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "converted"
    errors = run("bundled", folder, verify=False).errors
    return folder, errors


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted[0], tmp_path / "copy")


def overwrite(folder, name: str, at: int, data: bytes) -> None:
    """Puts `data` at byte `at` of a tensor, in place."""
    entry = Checkpoint(folder).entry(name)
    with entry.file.open("r+b") as f:
        f.seek(entry.begin + at)
        f.write(data)


def f32(value: float) -> bytes:
    return torch.tensor(value).numpy().tobytes()


def edit_json(file, edit) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def edit_shard(folder, name: str, edit) -> None:
    """Rewrites the shard that holds `name` after `edit` of its tensors."""
    file = Checkpoint(folder).entry(name).file
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_sound_checkpoint_has_no_problem_and_its_table_is_the_converters(converted, capsys):
    folder, errors = converted
    report = verify(folder, "bundled")
    assert report.problems == []
    assert report.errors.sums.keys() == errors.sums.keys() and len(errors.sums) == 15  # 5 layers, 3 projections
    for key, sums in errors.sums.items():
        assert report.errors.sums[key] == pytest.approx(sums, rel=1e-12)
    assert main([str(folder), "--source", "bundled"]) == 0
    output = capsys.readouterr().out
    assert f"{folder}: verified" in output and f"{errors.relative():.4f}"[:6] in output
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: verified\n"


@pytest.mark.parametrize(
    ("name", "at", "data", "wanted"),
    [
        (f"{GATE}_scale", 5, b"\x00", f"{GATE}_scale: expert 0: 1 block scales are zero, negative or NaN"),
        (f"{GATE}_scale", 5, b"\x7f\xff\x85", f"{GATE}_scale: expert 0: 3 block scales"),
        (f"{GATE}_scale_2", 8, f32(float("nan")), f"{GATE}_scale_2: expert 2: is nan, wanted a positive number"),
        (f"{GATE}_scale_2", 8, f32(0.0), f"{GATE}_scale_2: expert 2: is 0.0, wanted a positive number"),
        (f"{UP}_scale_2", 4, f32(0.5), f"{UP}_scale_2: expert 1: is 0.5, wanted gate_proj's"),
        (f"{GATE[:-6]}input_scale", 12, f32(-1.0), "gate_proj.input_scale: expert 3: is -1.0"),
        ("model.layers.0.self_attn.k_proj.k_scale", 0, f32(float("inf")), "k_proj.k_scale: is inf"),
    ],
)
def test_bad_scale_is_named_with_its_expert(name, at, data, wanted, copy, capsys):
    overwrite(copy, name, at, data)
    assert main([str(copy)]) == 1
    text = capsys.readouterr().err
    assert wanted in text and "Traceback" not in text


def test_one_bit_of_a_tensor_left_alone_is_seen_against_the_source_only(copy):
    overwrite(copy, "vision_model.conv1.weight", 100, b"\x55")
    assert verify(copy).problems == []
    (problem,) = verify(copy, "bundled", errors=False).problems
    assert problem.startswith("vision_model.conv1.weight: bytes differ from")


def test_changed_code_shows_in_the_error_table(copy, converted):
    overwrite(copy, GATE, 0, b"\x77" * 32)
    report = verify(copy, "bundled")
    assert report.problems == []
    gate, up = (3, "moe.gate_proj"), (3, "moe.up_proj")
    assert report.errors.relative([gate]) > converted[1].relative([gate])
    assert report.errors.sums[up] == pytest.approx(converted[1].sums[up], rel=1e-12)


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
    assert any(wanted in p for p in verify(copy).problems)


@pytest.mark.parametrize("name", [f"{GATE}_scale_2", f"{GATE[:-6]}input_scale", "model.layers.5.moe.router_bias"])
def test_missing_tensor_is_reported_even_when_the_index_forgets_it_too(name, copy):
    edit_shard(copy, name, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match="is missing, but .* lists it"):
        verify(copy)
    edit_json(copy / INDEX, lambda d: d["weight_map"].pop(name))
    assert f"{name}: is missing" in verify(copy).problems
    assert f"{name}: is missing" in verify(copy, "bundled").problems


def test_layer_dropped_as_a_whole_is_seen_against_the_source(copy):
    names = [n for n in Checkpoint(copy).entries if n.startswith("model.layers.10.")]
    for name in names:
        edit_shard(copy, name, lambda t, name=name: t.pop(name))
        edit_json(copy / INDEX, lambda d, name=name: d["weight_map"].pop(name))
    edit_json(copy / INDEX, lambda d: d["metadata"].update(total_size=total_bytes(copy)))
    assert verify(copy).problems == []
    assert "model.layers.10.eh_proj.weight: is missing" in verify(copy, "bundled").problems


def total_bytes(folder) -> int:
    return sum(e.end - e.begin for e in Checkpoint(folder).entries.values())


def test_index_faults_are_reported(copy):
    name = "lm_head.weight"
    edit_json(copy / INDEX, lambda d: (d["weight_map"].pop(name), d["metadata"].update(total_size=7)))
    assert verify(copy).problems == [
        f"{INDEX}: {name} is in None, wanted {Checkpoint(copy).entry(name).file.name}",
        f"{INDEX}: total_size is 7, wanted {total_bytes(copy)}",
    ]
    (copy / INDEX).unlink()
    assert verify(copy).problems == [f"{INDEX}: is missing"]


def edit_patterns(folder, edit) -> None:
    edit_json(folder / "config.json", lambda d: edit(d["quantization_config"]["ignore"]))
    edit_json(folder / "hf_quant_config.json", lambda d: edit(d["quantization"]["exclude_modules"]))


def test_pattern_that_matches_an_expert_is_reported(copy):
    edit_patterns(copy, lambda patterns: patterns.append("model.layers.4*"))
    assert set(verify(copy).problems) == {"config.json: ignore matches model.layers.4.moe.experts, which is quantized"}


def test_linear_that_no_pattern_matches_is_reported(copy):
    edit_patterns(copy, lambda patterns: patterns.remove("model.layers.1.*"))
    problems = verify(copy).problems
    assert len(problems) == 8  # q, k, v, o, g, gate, up, down
    assert "config.json: ignore does not match model.layers.1.self_attn.q_proj, which is not quantized" in problems


def test_metadata_files_that_disagree_are_reported(copy):
    def edit(data):
        data["quantization"]["exclude_modules"].pop()
        data["quantization"]["kv_cache_quant_algo"] = None
        data["quantization"]["group_size"] = 128

    edit_json(copy / "hf_quant_config.json", edit)
    assert len(verify(copy).problems) == 3
    edit_json(copy / "config.json", lambda d: d["quantization_config"].update(quant_algo="NVFP4_AWQ"))
    assert "config.json: quantization_config is not modelopt's NVFP4" in verify(copy).problems


def test_unfinished_or_unreadable_folder_is_one_line_and_exit_1(copy, tmp_path, capsys):
    def line(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "Traceback" not in text
        return text

    part = copy / "model-00002-of-00004.safetensors.part"
    part.write_bytes(b"")
    assert f"{part.name}: a file half written" in line(copy)
    part.unlink()
    assert "not a folder" in line(tmp_path / "none")
    assert "not a folder" in line(copy, "--source", tmp_path / "none")
    (copy / "hf_quant_config.json").unlink()
    assert "hf_quant_config.json: not found" in line(copy)
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name}: " in line(copy)


def test_source_of_another_shape_or_type_is_reported(copy, tmp_path):
    source = tmp_path / "source"
    run("bundled", source)  # itself NVFP4: its expert codes are no weights to compare with
    problems = verify(copy, source).problems
    assert f"{GATE}: is not in {source} as [32, 64, 192]" in problems and len(problems) == 15


def test_many_problems_are_cut_to_twenty_lines_and_a_count(copy, capsys):
    overwrite(copy, f"{GATE}_scale_2", 0, bytes(128))  # 32 experts of scale 0; and 32 that differ from up's
    assert main([str(copy)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "error: and 44 more"
