"""The converter stopped: killed, interrupted, out of disk or memory bounds, and going on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoint import PROJECTIONS, TEXT, contents, refused, tensors_of, write_source

import quantize.shards
from quantize import run
from quantize.layout import expert_shapes, tensor_shapes
from quantize.nvfp4 import main
from quantize.shards import Shard
from step_kernels.model.checkpoint import INDEX
from step_kernels.model.config import StepConfig


class Killed(BaseException):
    pass


def killed_at(monkeypatch, function: str, calls: int):
    """Makes os.`function` raise from its call number `calls` on, as if the process had died there."""
    original, count = getattr(os, function), iter(range(10**9))

    def die(*args, **kwargs):
        if next(count) >= calls:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(quantize.shards.os, function, die)


@pytest.mark.parametrize("function", ["replace", "pwrite", "fsync"])
def test_killed_anywhere_and_resumed_gives_the_same_bytes(function, source, converted, tmp_path, monkeypatch):
    kills = 0
    for calls in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 30, 60, 90, 120):
        folder = tmp_path / str(calls)
        with monkeypatch.context() as patch:
            killed_at(patch, function, calls)
            try:
                run(source, folder)
            except Killed:
                kills += 1
                assert not (folder / INDEX).exists()
        for whole in folder.glob("*.safetensors"):
            assert whole.read_bytes() == (converted / whole.name).read_bytes()
        errors = run(source, folder, resume=True).errors
        assert contents(folder) == contents(converted)
        assert errors.sums.keys() in ({(i, f"moe.{p}") for i in (1, 2) for p in PROJECTIONS}, set())
    assert kills >= 9


def test_process_killed_twenty_times_at_random_resumes_to_the_same_bytes(source, converted, tmp_path):
    """The children are forked off a process that has imported all but run nothing: torch's threads do not survive."""
    code = """if True:
        import os, random, signal, sys, time
        import torch
        from quantize import run
        source, target = sys.argv[1:]
        torch.set_num_threads(1)
        pick, slowest, killed = random.Random(0), 0.0, 0
        for i in range(-1, 20):
            folder = f"{target}/{i}"
            start = time.monotonic()
            child = os.fork()
            if child == 0:
                run(source, folder)
                os._exit(0)
            if i >= 0:
                time.sleep(pick.random() * slowest)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            slowest = slowest or time.monotonic() - start
            killed += os.WIFSIGNALED(status)
            run(source, folder, resume=True)
        print(killed)"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) >= 10
    for i in range(20):
        assert contents(tmp_path / str(i)) == contents(converted)


def test_resumed_run_keeps_whole_shards_and_their_errors(source, tmp_path, monkeypatch):
    wanted = run(source, tmp_path / "whole").errors
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 6)  # state, then state and shard thrice: the third shard is not renamed
        run(source, tmp_path / "out")
    kept = {f.name: f.stat().st_ino for f in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(kept) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    summary = run(source, tmp_path / "out", resume=True)
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in kept.items())
    assert summary.errors.sums == wanted.sums


def test_resume_with_other_settings_or_source_is_refused(source, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 4)
        run(source, tmp_path / "out")
    other = write_source(tmp_path / "other", TEXT | {"max_position_embeddings": 128}, tensors_of(TEXT))
    assert "other settings" in refused(capsys, 2, source, tmp_path / "out", "--resume", "--search", "max")
    assert "another source" in refused(capsys, 2, other, tmp_path / "out", "--resume")
    assert main([str(source), str(tmp_path / "out"), "--resume"]) == 0
    assert "no stopped conversion" in refused(capsys, 2, source, tmp_path / "out", "--resume", "--search", "max")


@pytest.mark.parametrize(
    "code, error, line",
    [
        (130, KeyboardInterrupt(), "interrupted; to go on"),
        (
            1,
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
            "error: cpu: CUDA out of memory; to go on where there is more",
        ),
    ],
)
def test_a_stop_says_how_to_go_on(source, tmp_path, monkeypatch, capsys, code, error, line):
    def stop(*args):
        raise error

    monkeypatch.setattr(quantize.shards.os, "pwrite", stop)
    again = f"python -m quantize.nvfp4 {source} {tmp_path / 'out'} --resume"
    assert refused(capsys, code, source, tmp_path / "out") == f"{line}: {again}\n"


def test_index_is_renamed_last_after_both_metadata_files(source, tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(quantize.shards.os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    run(source, tmp_path / "out")
    assert order[-3:] == ["hf_quant_config.json", "config.json", INDEX]
    assert set(order[:-3]) >= {f.name for f in source.glob("*.safetensors")}


def sparse_source(folder: Path, text: dict) -> Path:
    """A checkpoint of zeros, in one shard that takes no room on the disk."""
    config = StepConfig.from_dict(text)
    shapes = expert_shapes(config) | tensor_shapes(config)
    dtypes = {name: "F32" if name.endswith("router_bias") else "BF16" for name in shapes}
    folder.mkdir()
    shard = Shard(folder / "model.safetensors", {name: (dtypes[name], shape) for name, shape in shapes.items()}, {})
    with open(shard.path, "wb") as f:
        f.write(shard.head)
        f.truncate(shard.size)
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def test_source_larger_than_the_memory_it_may_have_is_converted(tmp_path):
    """Experts and linears of the release's sizes: gate and up 21 MB an expert, lm_head 0.4 GB."""
    resource = pytest.importorskip("resource")
    text = TEXT | {
        "hidden_size": 4096,
        "moe_intermediate_size": 1280,
        "moe_num_experts": 40,
        "vocab_size": 50_000,
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "layer_types": ["full_attention"],
        "moe_layers_enum": [0],
    }
    folder, limit = sparse_source(tmp_path / "source", text), 2 * 10**9
    assert (folder / "model.safetensors").stat().st_size > limit
    code = """if True:
        import sys
        from quantize import Settings, run
        summary = run(sys.argv[1], sys.argv[2], Settings(recipe="linears", lm_head=True), verify=False)
        print(summary.bytes_out)"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert out.returncode == 0, out.stderr
    (written,) = (tmp_path / "out").glob("*.safetensors")
    assert int(out.stdout) == written.stat().st_size


# Bad input.


def test_full_disk_is_one_line_and_resumable(source, converted, tmp_path, monkeypatch, capsys):
    pwrite, calls = os.pwrite, iter(range(10**9))

    def full(*args):
        if next(calls) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(quantize.shards.os, "pwrite", full)
        assert "No space left on device; to go on:" in refused(capsys, 1, source, tmp_path / "out")
    assert main([str(source), str(tmp_path / "out"), "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(converted)


def test_too_small_a_disk_is_refused_before_any_shard(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1,000 bytes are free, wanted" in refused(capsys, 1, source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
