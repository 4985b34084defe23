"""The README shows the registry's support table, and a GPU is told which kernels serve it and why."""

from pathlib import Path

import pytest

from step_kernels import registry
from step_kernels.__main__ import main


def test_readme_shows_the_registrys_support_table(capsys):
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    from step_kernels.flashinfer import installed

    if installed() is None:
        pytest.skip("flashinfer is not installed")
    assert main(["--matrix"]) == 0
    table = capsys.readouterr().out.rstrip()
    assert table.count("\n") > 8
    assert table in (Path(__file__).parents[1] / "README.md").read_text()


def test_every_ops_table_is_printed_for_hopper_at_the_models_shapes(capsys, monkeypatch):
    pytest.importorskip("cuda.bindings")
    monkeypatch.delenv("STEP_KERNELS_W4A8", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "H200")
    monkeypatch.setattr("step_kernels.registry.compute_capability", lambda i: 90)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" on sm_90\n") == len(registry.ops())
    for op in ("nvfp4_linear", "nvfp4_moe"):
        rows = printed.split(f"{op} on sm_90\n")[1].split("\n\n")[0].splitlines()
        assert "STEP_KERNELS_W4A8=1 allows that" in rows[0] and rows[1].split() == ["cuda", "serves"]
