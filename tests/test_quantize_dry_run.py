"""What a dry run says, against what the run then does; and the devices that the work is spread over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_checkpoint import contents, refused

from quantize import Settings, UsageError, lanes, run
from quantize.estimate import actions, estimate
from quantize.nvfp4 import main
from quantize.plan import make_plan
from step_kernels.model.checkpoint import Checkpoint


def test_dry_run_says_what_the_run_reads_and_writes_and_leaves_nothing(source, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "sub" / "out"
    plan, cost = estimate(source, target)
    assert list((tmp_path / "disk").iterdir()) == []
    summary = run(source, target)
    assert (cost.read, cost.written) == (summary.bytes_in, summary.bytes_out)
    assert cost.written == pytest.approx(sum(f.stat().st_size for f in target.glob("*.safetensors")), rel=1e-3)
    assert cost.quantized == 6 * 4 * 192 * 144 * 2
    assert min(cost.reading, cost.writing, cost.quantizing) > 0 and cost.seconds >= cost.read / cost.reading


def test_plan_names_each_tensor_its_action_and_its_file(source, capsys):
    checkpoint = Checkpoint(source)
    found = actions(make_plan(checkpoint, Settings()))
    assert sum(a.read for a in found) == sum(e.end - e.begin for e in checkpoint.entries.values())
    gate = next(a for a in found if a.name == "model.layers.1.moe.gate_proj.weight")
    elements = 4 * 144 * 192
    assert (gate.what, gate.tensor) == ("quantize", "BF16 [4, 144, 192]")
    assert (gate.read, gate.written) == (2 * elements, elements // 2 + elements // 16 + 4 * 4)
    assert gate.file == "model-00002-of-00004.safetensors"
    assert {a.what for a in found if a.name.startswith("model.layers.3.")} == {"copy"}  # the MTP layer


def test_dry_run_prints_a_line_for_each_kind_of_tensor_or_each_tensor(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert main([str(source), str(tmp_path / "out"), "--dry-run", "-v"]) == 0
    long = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    assert len(long) == len(Checkpoint(source).entries) + 3  # a heading, the rates, the sums
    counts = [int(line.split()[1]) for line in short[1:-2]]
    assert sum(counts) == len(Checkpoint(source).entries) and len(counts) < 20
    (line,) = (line for line in short if "moe.up_proj.weight" in line)
    assert line.split()[:2] == ["quantize", "2"] and line.endswith(
        "model.layers.*.moe.up_proj.weight, BF16 [4, 144, 192]"
    )


def test_dry_run_refuses_a_disk_too_small_and_a_target_in_use(source, converted, tmp_path, monkeypatch, capsys):
    assert "is not empty" in refused(capsys, 2, source, converted, "--dry-run")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    line = refused(capsys, 1, source, tmp_path / "out", "--dry-run")
    assert "100,000 bytes are free, wanted" in line


@pytest.mark.parametrize("number", [1, 2, 7])
def test_bytes_and_errors_do_not_depend_on_the_number_of_lanes(number, source, converted, tmp_path, monkeypatch):
    wanted = run(source, tmp_path / "wanted").errors.sums
    monkeypatch.setattr(lanes, "count", lambda *_: number)
    assert run(source, tmp_path / "out").errors.sums == wanted
    assert contents(tmp_path / "out") == contents(converted)


def test_lanes_leave_torchs_number_of_threads_as_it_was(source, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(source, tmp_path / "out", verify=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("names", ["cuda:999", "gpu", "cpu,cuda:0", "cuda:0,cuda:998", ""])
def test_devices_that_are_not_there_are_refused(names):
    with pytest.raises(UsageError, match=f"device: got {names}, "):
        lanes.devices(names)


def test_lanes_are_as_many_as_their_memory_allows():
    cpu = lanes.devices("cpu")
    assert lanes.count(cpu, 0) == lanes.count(cpu, 1000) >= 2
    assert lanes.count(cpu, 480 << 20) == 2 and lanes.count(cpu, 1 << 40) == 1


@pytest.mark.gpu
def test_every_gpu_writes_the_bytes_of_one_and_of_the_cpu(source, converted, tmp_path):
    names = ["cuda:0", "cuda", ",".join(str(d) for d in lanes.devices("cuda"))]
    assert lanes.devices(names[1]) == lanes.devices(names[2])
    for i, name in enumerate(names):
        run(source, tmp_path / str(i), device=name)
        assert contents(tmp_path / str(i)) == contents(converted)


@pytest.mark.gpu
def test_lanes_of_two_devices_write_the_bytes_of_one(source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "devices", lambda names: [torch.device("cuda", 0), torch.device("cpu")])
    run(source, tmp_path / "both", device="cuda")
    assert contents(tmp_path / "both") == contents(converted)
