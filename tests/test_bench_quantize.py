"""The bench of the converter."""

import pytest

from bench.quantize import main


@pytest.mark.parametrize("inside", [True, False])
def test_folder_that_is_there_is_refused_and_left_alone(tmp_path, capsys, inside):
    kept = tmp_path / "kept"
    if inside:
        kept.write_text("of the user")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--layers", "1", "--experts", "8"])
    assert stopped.value.code == 2
    assert f"folder: {tmp_path}: File exists, wanted a new folder" in capsys.readouterr().err
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == ([kept] if inside else [])
