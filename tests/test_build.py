"""csrc/build.py: every kernel compiles for every target its name promises, and cubins are never stale."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from step_kernels.cuda import driver

build = driver.build
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A csrc of one good kernel and one header, in place of the real one."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "three.cuh").write_text("constexpr int kThree = 3;\n")
    kernel = '#include "common/three.cuh"\nextern "C" __global__ void three(int* out) { *out = kThree; }\n'
    (tmp_path / "sm90_three.cu").write_text(kernel)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path


@needs_nvcc
@pytest.mark.parametrize(
    "source, target",
    [pytest.param(s, t, id=f"{s.stem}-sm_{t}") for s in build.sources() for t in build.targets(s)],
)
def test_every_kernel_compiles_for_its_targets_without_spilling(source, target):
    cubin, report = build.compile_with_nvcc(source, target)
    symbols = set(re.findall(rb"\.text\.(\w+)\0", cubin))
    assert symbols and all(name.startswith(source.stem.encode()) for name in symbols)
    assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}


@needs_nvcc
def test_the_launchers_variants_are_the_symbols_in_the_cubin():
    from step_kernels.cuda import moe_topk

    cubin, _ = build.compile_with_nvcc(driver.CSRC / "smxx_moe_topk.cu", "90a")
    symbols = {name.decode() for name in re.findall(rb"\.text\.(\w+)\0", cubin)}
    assert symbols == {kernel.symbol for kernel in moe_topk.VARIANTS.values()}


@pytest.mark.parametrize(
    "name, targets",
    [
        ("sm90_gemm.cu", ("90a",)),
        ("sm100_gemm.cu", ("100a", "103a")),
        ("sm120_gemm.cu", ("120a",)),
        ("smxx_gemm.cu", ("90a", "100a", "103a", "120a")),
    ],
)
def test_a_name_prefix_promises_targets(name, targets):
    assert build.targets(build.FOLDER / name) == targets


@pytest.mark.parametrize("name", ["sm80_gemm.cu", "gemm.cu", "sm9_gemm.cu"])
def test_an_unknown_prefix_is_an_error_that_names_the_file(name):
    with pytest.raises(ValueError, match=f"^{name}: got prefix .* wanted one of sm90, sm100, sm120, smxx$"):
        build.targets(build.FOLDER / name)


def test_a_gpu_gets_its_own_target_or_plain_code_or_an_error():
    assert build.target_for(build.FOLDER / "smxx_gemm.cu", 90) == "90a"
    assert build.target_for(build.FOLDER / "smxx_gemm.cu", 89) == "89"
    assert build.target_for(build.FOLDER / "sm100_gemm.cu", 103) == "103a"
    with pytest.raises(ValueError, match="sm100_gemm.cu: got a GPU of sm_90, wanted sm_100a or sm_103a"):
        build.target_for(build.FOLDER / "sm100_gemm.cu", 90)


def test_a_cubins_name_changes_with_source_and_header_and_target(folder):
    source = folder / "sm90_three.cu"
    names = [build.cubin_name(source, "90a"), build.cubin_name(source, "90")]
    (folder / "common" / "three.cuh").write_text("constexpr int kThree = 4;\n")
    names.append(build.cubin_name(source, "90a"))
    source.write_text(source.read_text() + "// changed\n")
    names.append(build.cubin_name(source, "90a"))
    (folder / "common" / "unused.cuh").write_text("constexpr int kUnused = 1;\n")
    assert len(set(names)) == 4 and build.cubin_name(source, "90a") == names[-1]


@needs_nvcc
def test_the_command_prints_a_row_a_cubin_and_drops_older_cubins(folder, capsys):
    out = folder / "out"
    assert build.main(["--out", str(out), "--jobs", "1"]) == 0
    (folder / "sm90_three.cu").write_text((folder / "sm90_three.cu").read_text().replace("*out = ", "*out = 1 + "))
    assert build.main(["--out", str(out), "--jobs", "1"]) == 0
    assert [f.name for f in out.iterdir()] == [build.cubin_name(folder / "sm90_three.cu", "90a")]
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:2] == ["sm90_three.cu", "90a"] and int(row[4]) > 0 and row[5] == "0"


@needs_nvcc
def test_the_command_names_the_file_that_fails_and_exits_1(folder, capsys):
    (folder / "sm120_bad.cu").write_text("nonsense")
    assert build.main(["--out", str(folder / "out")]) == 1
    captured = capsys.readouterr()
    assert "error: sm120_bad.cu for sm_120a: nvcc failed" in captured.err
    assert re.search(r"sm120_bad.cu +120a +FAILED", captured.out)
    assert [f.name for f in (folder / "out").iterdir()] == [build.cubin_name(folder / "sm90_three.cu", "90a")]


def test_without_nvcc_the_command_says_so_and_exits_1(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    assert build.main([]) == 1
    assert capsys.readouterr().err == "error: nvcc is not on PATH; it comes with the CUDA toolkit 13\n"


def test_a_number_of_jobs_below_one_is_misuse(capsys):
    with pytest.raises(SystemExit) as caught:
        build.main(["--jobs", "0"])
    assert caught.value.code == 2 and "--jobs: got 0, wanted at least 1" in capsys.readouterr().err


@needs_nvcc
def test_a_wheel_carries_sources_and_headers_and_a_cubin_a_target(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    root = driver.CSRC.parent
    if not (root / "pyproject.toml").is_file():
        pytest.skip("needs the checkout, this is an installed package")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results", "tests", "cubins")
    shutil.copytree(root, tmp_path / "checkout", ignore=ignored)
    command = [sys.executable, "-c", "import build; print(build.build_wheel('..'))"]
    environment = {**os.environ, "PYTHONPATH": "csrc"}
    run = subprocess.run(command, cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    wheel = tmp_path / run.stdout.splitlines()[-1]
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    for source in build.sources():
        assert f"step_kernels/csrc/{source.name}" in names
        for target in build.targets(source):
            assert f"step_kernels/csrc/cubins/{build.cubin_name(source, target)}" in names
    assert {"step_kernels/csrc/build.py", "step_kernels/csrc/common/warp.cuh"} <= set(names)
