"""What the converter refuses, in one line, with nothing half-written under a final name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import TEXT, contents, read, refused, tensors_of, write_source

import quantize.shards
from quantize import Settings, UsageError, run
from quantize.jobs import copy
from quantize.nvfp4 import main
from quantize.plan import make_plan
from quantize.shards import Shard
from step_kernels import nvfp4
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError


def edited(source: Path, folder: Path, edit) -> Path:
    """The source with `edit` applied to its tensors."""
    tensors = read(source)
    edit(tensors)
    return write_source(folder, TEXT, tensors)


GATE = "model.layers.1.moe.gate_proj.weight"


def poison(value: float):
    def edit(tensors):
        tensors[GATE][2, 3, 4] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda t: t.update({"model.layers.1.moe.extra": torch.ones(2)}), "model.layers.1.moe.extra: no rule"),
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.pop("model.layers.0.self_attn.g_proj.weight"), "self_attn.g_proj.weight is missing"),
        (lambda t: t.pop("model.layers.3.enorm.weight"), "model.layers.3.enorm.weight is missing"),
        (lambda t: t.update({GATE: t[GATE][:, :-1].clone()}), "shape [4, 143, 192], wanted [4, 144, 192]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int32)}), f"{GATE}: dtype I32, wanted BF16 or F16 or F32"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), f"{GATE}_scale_inv is missing"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.uint8)}), "lm_head.weight: dtype U8"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(4, 2, 2)}), "wanted F8_E4M3 with it"),
        (poison(float("nan")), f"{GATE}: expert 2: holds NaN or infinity"),
        (poison(float("-inf")), f"{GATE}: expert 2: holds NaN or infinity"),
    ],
)
def test_bad_tensor_is_named_in_one_line_and_no_final_file_is_left_broken(edit, wanted, source, tmp_path, capsys):
    bad = edited(source, tmp_path / "bad", edit)
    assert wanted in refused(capsys, 1, bad, tmp_path / "out")
    out = tmp_path / "out"
    assert not (out / INDEX).exists() and not (out / "config.json").exists()
    for file in out.glob("*.safetensors"):
        assert len(load_file(file)) > 0


def test_mtp_layers_may_be_absent_as_a_whole(source, tmp_path):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.3.")]:
            del tensors[name]

    assert run(edited(source, tmp_path / "trunk", drop), tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"moe_num_experts": 5}, "shape [4, "),
        ({"moe_intermediate_size": 136}, "moe_intermediate_size is 136, wanted a multiple of 16"),
        ({"moe_layers_enum": ""}, "moe_layers_enum names no layer"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "already quantized"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already quantized"),
    ],
)
def test_bad_config_is_refused_by_field(config, wanted, tmp_path, capsys):
    bad = write_source(tmp_path / "bad", TEXT | config, tensors_of(TEXT))
    assert wanted in refused(capsys, 1, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_files_are_named(source, tmp_path, capsys):
    shard = "model-00003-of-00004.safetensors"
    for i, break_it in enumerate(
        (
            lambda f: f.unlink(),
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            lambda f: f.write_bytes(b"\xff" * 64),
            lambda f: f.write_bytes(b""),
        )
    ):
        bad = write_source(tmp_path / f"bad{i}", TEXT, tensors_of(TEXT))
        break_it(bad / shard)
        assert shard in refused(capsys, 1, bad, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "config.json: not found" in refused(capsys, 1, tmp_path, tmp_path / "out")
    assert "not a folder" in refused(capsys, 1, tmp_path / "none", tmp_path / "out")


def test_targets_that_cannot_be_meant_exit_with_2(source, converted, tmp_path, capsys):
    before = contents(converted)
    assert "--resume" in refused(capsys, 2, source, converted)
    assert "is the source too" in refused(capsys, 2, source, source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "no stopped conversion" in refused(capsys, 2, source, tmp_path / "mine", "--resume")
    (tmp_path / "download").mkdir()
    (tmp_path / "download/film.part").write_text("keep")
    assert main([str(source), str(tmp_path / "download"), "--resume", "--no-verify"]) == 0
    assert (tmp_path / "download/film.part").read_text() == "keep"
    assert contents(converted) == before and contents(tmp_path / "mine") == {"notes.txt": b"keep"}
    if not torch.cuda.is_available():
        assert "no GPU" in refused(capsys, 2, source, tmp_path / "out", "--device", "cuda")


def test_target_that_cannot_be_written_is_one_line(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(capsys, 1, source, tmp_path / "file/out")
    assert "wanted a folder" in refused(capsys, 1, source, tmp_path / "file")


def test_read_only_target_is_one_line(source, tmp_path, monkeypatch, capsys):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        assert refused(capsys, 1, source, out) == f"error: {out}: Read-only file system\n"
    with monkeypatch.context() as patch:
        patch.setattr(quantize.shards.os, "truncate", read_only)
        assert ".safetensors: Read-only file system; to go on:" in refused(capsys, 1, source, out)
    assert main([str(source), str(out), "--resume"]) == 0


def test_tensor_in_two_shards_is_named_with_both(source, tmp_path, capsys):
    bad = write_source(tmp_path / "bad", TEXT, tensors_of(TEXT))
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (2, 3)]
    gate, up = (load_file(bad / shard) for shard in shards)
    save_file(up | {GATE: gate[GATE]}, bad / shards[1], metadata={"format": "pt"})
    line = refused(capsys, 1, bad, tmp_path / "out")
    assert f"{shards[1]}: {GATE} is also in {shards[0]}" in line


def test_zero_experts_are_legal_with_scales_of_one_and_named(source, tmp_path, capsys):
    names = [f"model.layers.{n}_proj.weight" for n in ("1.moe.gate", "1.moe.up", "2.moe.down")]

    def edit(tensors):
        for name in names:
            tensors[name][3] = 0
        tensors[names[1]][0] = 0  # and gate is not: their scale is gate's

    out = tmp_path / "out"
    assert main([str(edited(source, tmp_path / "zeros", edit)), str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "all zero" in line]
    wanted = [(names[0], 3), (names[1], 0), (names[1], 3), (names[2], 3)]
    assert lines == [f"{name}: expert {i} is all zero in the source: codes 0, scales 1" for name, i in wanted]
    tensors = read(out)
    for name in names:
        codes, scales, outer = (tensors[name + suffix][3] for suffix in ("", "_scale", "_scale_2"))
        assert codes.amax() == 0 and outer == 1 and torch.equal(scales.float(), torch.ones(scales.shape))
    assert tensors[f"{names[1]}_scale_2"][0] == tensors[f"{names[0]}_scale_2"][0] < 1


def test_refused_result_has_no_index(source, tmp_path, monkeypatch, capsys):
    def zero(amax, *_):
        return [torch.zeros(amax.shape, dtype=torch.float8_e4m3fn)]

    monkeypatch.setattr(nvfp4, "candidate_scales", zero)
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "block scales are zero, negative or NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / INDEX).exists()


def test_unknown_search_is_refused_by_command_and_function(capsys):
    with pytest.raises(UsageError, match="search: got 'best', wanted one of mse, max, four-six"):
        Settings(search="best")
    with pytest.raises(SystemExit) as leaving:
        main(["bundled", "out", "--search", "best"])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: argument --search: ") and line.count("\n") == 1


def test_source_that_shrinks_while_being_read_is_an_error(source, tmp_path):
    folder = write_source(tmp_path / "source", TEXT, tensors_of(TEXT))
    plan = make_plan(Checkpoint(folder), Settings())
    (entry, file, name) = next(copy for copy in plan.copies if copy[2] == "lm_head.weight")
    os.truncate(entry.file, entry.begin + 10)
    with pytest.raises(CheckpointError, match="lm_head.weight: the file ends early"):
        copy(entry, 0, Shard(tmp_path / file, plan.shards[file], {}), name)
