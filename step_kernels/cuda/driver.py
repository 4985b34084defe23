"""From a .cu file to a launch on torch's current stream: find or compile the cubin, load it once, launch it.

A cubin comes from the wheel, else from the user's cache, else from nvcc or, without it, from NVRTC. This is
the only file that imports cuda-python, and only when a kernel is compiled or launched.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import struct
import sys
import threading
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds csrc inside the package, a checkout beside it.
CSRC = next(f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (f / "build.py").is_file())
# By path, not by name: a checkout that is not installed has no package step_kernels.csrc.
_spec = importlib.util.spec_from_file_location("step_kernels.csrc.build", CSRC / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

_loading = threading.Lock()


class Kernel:
    """One `extern "C"` kernel of csrc/<source>.cu; loads on each GPU at its first launch there.

    `parameters` are the kernel's, as codes of the struct module: P pointer, i int, q long long, f float.
    `shared_bytes` is the dynamic shared memory of every launch. A `dependent` kernel may start before the kernel
    ahead of it in the stream has ended, and must wait for that one (griddepcontrol.wait) before it uses its results.
    """

    def __init__(self, source: str, symbol: str, parameters: str, shared_bytes: int = 0, dependent: bool = False):
        self.source, self.symbol, self.shared_bytes = CSRC / f"{source}.cu", symbol, shared_bytes
        self.dependent, self._config = dependent, None
        self._functions = {}  # by device index
        self._lock = threading.Lock()
        self._layout = struct.Struct(parameters)
        # The driver wants an array of addresses, one a parameter. One buffer laid out as a C struct and filled
        # anew for every launch saves building ten ctypes objects a call.
        self._buffer = ctypes.create_string_buffer(self._layout.size)
        start, offsets = ctypes.addressof(self._buffer), []
        for i, code in enumerate(parameters):
            offsets.append(struct.calcsize(parameters[: i + 1]) - struct.calcsize(code))
        self._addresses = (ctypes.c_void_p * len(parameters))(*(start + offset for offset in offsets))
        self._parameters = ctypes.addressof(self._addresses)

    def launch(self, grid: tuple[int, int, int], block: int, *arguments) -> None:
        """Queue the kernel on torch's current device and stream; tensors pass as their data pointers."""
        device = torch.cuda.current_device()
        function = self._functions.get(device) or self._load(device)
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock:  # between filling the buffer and the driver's copy of it
            self._layout.pack_into(self._buffer, 0, *values)
            error = self._queue(function, grid, block, stream)
            if error == _cuda().CUresult.CUDA_ERROR_INVALID_CONTEXT:  # this thread's first CUDA call
                _make_context_current(device)
                error = self._queue(function, grid, block, stream)
        if error:
            raise RuntimeError(
                f"{self.symbol}: launch failed with {error.name} "
                f"(grid {grid}, block {block}, dynamic shared memory {self.shared_bytes} bytes)"
            )

    def _queue(self, function, grid: tuple[int, int, int], block: int, stream: int):
        if not self.dependent:
            shape = (*grid, block, 1, 1, self.shared_bytes, stream, self._parameters, 0)
            return _cuda().cuLaunchKernel(function, *shape)[0]
        config = self._config = self._config or _dependent_launch()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.sharedMemBytes, config.hStream = block, self.shared_bytes, stream
        return _cuda().cuLaunchKernelEx(config, function, self._parameters, 0)[0]

    def _load(self, device: int):
        with _loading:
            if device not in self._functions:
                major, minor = torch.cuda.get_device_capability(device)
                module = _load_module(self.source, build.target_for(self.source, major * 10 + minor), device)
                cuda = _cuda()
                function = _checked(cuda.cuModuleGetFunction(module, self.symbol.encode()), self.symbol)
                if self.shared_bytes > 48 * 1024:  # what a block gets without asking
                    limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    what = f"{self.symbol}: {self.shared_bytes} bytes of shared memory"
                    _checked(cuda.cuFuncSetAttribute(function, limit, self.shared_bytes), what)
                    # All of the multiprocessor's, so that a block of the next kernel fits beside this one's.
                    carveout = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                    _checked(cuda.cuFuncSetAttribute(function, carveout, 100), what)
                self._functions[device] = function
            return self._functions[device]


@functools.cache
def multiprocessors(device: int) -> int:
    """Of the GPU of that index."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def cubin(source: Path, target: str) -> bytes:
    """The file's cubin for `target` ("90a"), compiled and kept in the user's cache if neither it nor csrc has it."""
    name = build.cubin_name(source, target)
    cache = Path(os.environ.get("STEP_KERNELS_CACHE") or Path.home() / ".cache" / "step_kernels")
    for folder in (source.parent / "cubins", cache):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    print(f"step_kernels: compiling {source.stem} for sm_{target}, about 3 s", file=sys.stderr, flush=True)
    compiled = compile_cubin(source, target, "nvcc" if shutil.which("nvcc") else "nvrtc")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        build.write(cache / name, compiled)
    except OSError as error:  # the kernel runs all the same; the next process compiles again
        print(f"step_kernels: cannot keep {name} in {cache}: {error.strerror}", file=sys.stderr)
    return compiled


def compile_cubin(source: Path, target: str, compiler: str) -> bytes:
    """The cubin as "nvcc" or "nvrtc" makes it, without a GPU; RuntimeError with the compiler's message."""
    return build.compile_with_nvcc(source, target)[0] if compiler == "nvcc" else _compile_with_nvrtc(source, target)


def _compile_with_nvrtc(source: Path, target: str) -> bytes:
    what = f"{source.name} for sm_{target}"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # no bindings; bindings that find no library
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"{what}: no compiler: nvcc is not on PATH and NVRTC does not load ({reason}); "
            "pip install 'step-kernels[cu13]' brings NVRTC"
        ) from None
    options = [*build.FLAGS, f"--gpu-architecture=sm_{target}", *(f"-I{folder}" for folder in _include_folders())]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []), what)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if error:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), what)
            _checked(nvrtc.nvrtcGetProgramLog(program, log), what)
            raise RuntimeError(f"{what}: NVRTC failed\n{log.rstrip(bytes(1)).decode().rstrip()}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), what)
        _checked(nvrtc.nvrtcGetCUBIN(program, code), what)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _include_folders() -> list[Path]:
    """csrc, then CUDA's own headers where the pip packages or a toolkit leave them; NVRTC has none built in."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) / "cu13" for root in (spec.submodule_search_locations if spec else [])]
    roots += [Path(os.environ.get(name, "/usr/local/cuda")) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [root / include for root in roots for include in ("include", "include/cccl")]
    return [CSRC, *(f for f in dict.fromkeys(folders) if f.is_dir())]


@functools.cache
def _load_module(source: Path, target: str, device: int):
    _make_context_current(device)
    return _checked(_cuda().cuModuleLoadData(cubin(source, target)), f"{source.name}: loading for sm_{target}")


def _dependent_launch():
    """A launch configuration with programmatic stream serialization."""
    cuda = _cuda()
    attribute, config = cuda.CUlaunchAttribute(), cuda.CUlaunchConfig()
    attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.blockDimY = config.blockDimZ = config.numAttrs = 1
    config.attrs = [attribute]
    return config


def _make_context_current(device: int) -> None:
    """torch's context; a thread that has not called the CUDA runtime yet has none, and the driver makes none."""
    cuda = _cuda()
    handle = _checked(cuda.cuDeviceGet(device), f"device {device}")
    context = _checked(cuda.cuDevicePrimaryCtxRetain(handle), f"device {device}")
    _checked(cuda.cuCtxSetCurrent(context), f"device {device}")


def _checked(result: tuple, what: str):
    """The value in (error, value), or RuntimeError."""
    error, *values = result
    if error:
        raise RuntimeError(f"{what}: {error.name}")
    return values[0] if values else None


@functools.cache
def _cuda():
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError(f"CUDA kernels need cuda-bindings: pip install 'step-kernels[cu13]' ({error})") from None
    return driver
