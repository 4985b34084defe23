"""step_kernels.cuda.driver: both compilers, the cache, and what a user sees when something is missing."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from step_kernels.cuda import driver

KERNEL = """
#include "common/warp.cuh"
extern "C" __global__ void smxx_sum(const float* x, float* out, long long offset, int count, float scale) {
  extern __shared__ float s_x[];
  s_x[threadIdx.x] = threadIdx.x < count ? x[offset + threadIdx.x] : 0.0f;
  const float sum = warp_sum(s_x[threadIdx.x]);
  if (threadIdx.x == 0) *out = sum * scale;
}
"""


def has_nvrtc():
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
COMPILERS = [pytest.param("nvcc", marks=needs_nvcc), pytest.param("nvrtc", marks=needs_nvrtc)]
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("nvcc") or has_nvrtc()), reason="neither nvcc nor NVRTC is here"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel file of its own, and an empty cache."""
    monkeypatch.setenv("STEP_KERNELS_CACHE", str(tmp_path / "cache"))
    driver.cubin.cache_clear()
    path = tmp_path / "smxx_sum.cu"
    path.write_text(KERNEL)
    return path


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("target", ["80", "90a", "100a", "120a"])
def test_each_compiler_makes_a_cubin_that_holds_the_symbol(source, compiler, target):
    cubin = driver.compile_cubin(source, target, compiler)
    assert cubin[:4] == b"\x7fELF" and b".text.smxx_sum\0" in cubin


@needs_nvrtc
def test_nvrtc_compiles_every_kernel_of_csrc_and_finds_cudas_headers(tmp_path):
    for path in driver.build.sources():
        cubin = driver.compile_cubin(path, driver.build.targets(path)[0], "nvrtc")
        assert f".text.{path.stem}".encode() in cubin
    path = tmp_path / "smxx_half.cu"
    path.write_text('#include <cuda_bf16.h>\nextern "C" __global__ void half_(__nv_bfloat16* x) { *x = 1.0f; }')
    if any((folder / "cuda_bf16.h").is_file() for folder in driver._include_folders()):
        assert b".text.half_" in driver.compile_cubin(path, "90a", "nvrtc")


@needs_a_compiler
def test_a_cubin_in_the_cache_is_not_compiled_again(source, tmp_path, monkeypatch, capfd):
    first = driver.cubin(source, "90a")
    assert capfd.readouterr().err.splitlines() == ["step_kernels: compiling smxx_sum for sm_90a, about 3 s"]
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [driver.build.cubin_name(source, "90a")]
    driver.cubin.cache_clear()  # as a new process
    monkeypatch.setattr(driver, "compile_cubin", None)
    assert driver.cubin(source, "90a") == first
    assert capfd.readouterr().err == ""


def test_a_cubin_beside_the_sources_is_taken_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "compile_cubin", None)
    (tmp_path / "cubins").mkdir()
    (tmp_path / "cubins" / driver.build.cubin_name(source, "90a")).write_bytes(b"prebuilt")
    assert driver.cubin(source, "90a") == b"prebuilt"


@needs_a_compiler
def test_changed_source_is_compiled_anew(source):
    first = driver.cubin(source, "90a")
    source.write_text(KERNEL.replace("smxx_sum", "smxx_other"))
    driver.cubin.cache_clear()
    second = driver.cubin(source, "90a")
    assert b"smxx_other" in second and b"smxx_other" not in first


@needs_a_compiler
def test_two_processes_that_race_leave_one_good_file(source, tmp_path):
    code = "import sys, pathlib; from step_kernels.cuda import driver; driver.cubin(pathlib.Path(sys.argv[1]), '90a')"
    racing = [subprocess.Popen([sys.executable, "-c", code, source], stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait() for process in racing] == [0, 0], [process.stderr.read() for process in racing]
    (cubin,) = (tmp_path / "cache").iterdir()
    assert cubin.name == driver.build.cubin_name(source, "90a")
    assert b".text.smxx_sum\0" in cubin.read_bytes()


@needs_a_compiler
def test_a_cache_that_cannot_be_written_costs_a_compilation_and_no_more(source, tmp_path, monkeypatch, capfd):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert b".text.smxx_sum\0" in driver.cubin(source, "90a")
    _, kept = capfd.readouterr().err.splitlines()
    assert kept.startswith("step_kernels: cannot keep smxx_sum.sm_90a.") and str(tmp_path / "cache") in kept


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_broken_source_is_named_with_the_compilers_message(source, compiler):
    source.write_text(KERNEL.replace("* scale", "* scales"))
    with pytest.raises(RuntimeError, match=r"^smxx_sum.cu for sm_90a: (nvcc|NVRTC) failed\n") as caught:
        driver.compile_cubin(source, "90a", compiler)
    assert 'identifier "scales" is undefined' in str(caught.value)


def test_without_a_compiler_the_error_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # importing it fails, as where it is not installed
    with pytest.raises(RuntimeError) as caught:
        driver.cubin(source, "90a")
    assert str(caught.value).startswith("smxx_sum.cu for sm_90a: no compiler: nvcc is not on PATH and NVRTC")
    assert "pip install 'step-kernels[cu13]'" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_the_module_imports_without_cuda_python_and_without_a_compiler(tmp_path):
    code = "import sys; sys.modules['cuda'] = None; from step_kernels.cuda import moe_topk; print(moe_topk.MAX_EXPERTS)"
    environment = {**os.environ, "PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "512\n", run.stderr


def test_parameters_lie_in_the_buffer_as_in_a_c_struct():
    kernel = driver.Kernel("smxx_moe_topk", "any", "iPfqi")
    start = driver.ctypes.addressof(kernel._buffer)
    assert [address - start for address in kernel._addresses] == [0, 8, 16, 24, 32]


def summing_kernel(source, shared_bytes):
    kernel = driver.Kernel("smxx_sum", "smxx_sum", "PPqif", shared_bytes)
    kernel.source = source
    return kernel


@pytest.mark.gpu
@pytest.mark.parametrize("shared_bytes", [128, 100 * 1024])  # the second needs the attribute set
def test_a_launch_passes_pointers_and_integers_and_floats(source, shared_bytes):
    x, out = torch.arange(100.0, device="cuda"), torch.zeros(1, device="cuda")
    summing_kernel(source, shared_bytes).launch((1, 1, 1), 32, x, out, 10, 3, 0.5)
    assert out.item() == (10 + 11 + 12) * 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_cubin_of_either_compiler_runs(source, compiler, monkeypatch):
    monkeypatch.setattr(driver.shutil, "which", lambda name: name if compiler == "nvcc" else None)
    driver._load_module.cache_clear()
    x, out = torch.ones(32, device="cuda"), torch.zeros(1, device="cuda")
    summing_kernel(source, 128).launch((1, 1, 1), 32, x, out, 0, 32, 1.0)
    assert out.item() == 32


@pytest.mark.gpu
def test_threads_that_launch_one_kernel_do_not_mix_their_arguments(source):
    kernel = summing_kernel(source, 128)
    x, out = torch.ones(32, device="cuda"), torch.zeros(4, 200, device="cuda")

    def work(thread):
        for i in range(200):
            kernel.launch((1, 1, 1), 32, x, out[thread, i:], 0, thread + 1, i + 1.0)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 201)))


@pytest.mark.gpu
def test_a_refused_launch_names_kernel_and_shape_and_cudas_error(source):
    x = torch.ones(32, device="cuda")
    with pytest.raises(RuntimeError) as caught:
        summing_kernel(source, 128).launch((1, 1, 1), 2048, x, x, 0, 32, 1.0)
    message = "smxx_sum: launch failed with CUDA_ERROR_INVALID_VALUE (grid (1, 1, 1), block 2048, dynamic shared memory"
    assert str(caught.value).startswith(message)


@pytest.mark.gpu
def test_more_shared_memory_than_the_gpu_has_is_an_error_that_names_the_kernel(source):
    x = torch.ones(32, device="cuda")
    with pytest.raises(RuntimeError, match="^smxx_sum: 1048576 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"):
        summing_kernel(source, 1 << 20).launch((1, 1, 1), 32, x, x, 0, 32, 1.0)
