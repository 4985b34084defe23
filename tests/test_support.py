"""The README's support table is the registry's."""

from pathlib import Path

import pytest

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
