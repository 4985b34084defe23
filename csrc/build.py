"""Compiles csrc/*.cu to cubins with nvcc, and is the project's PEP 517 backend: setuptools plus those cubins.

    python csrc/build.py --jobs 2        # every file for every target its name prefix promises

Needs only the standard library, so that pip can import it before anything is installed. The rules of which
targets, which flags and which file name are here alone; step_kernels/cuda/driver.py loads this file for them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CUBINS = FOLDER / "cubins"
FLAGS = ("-std=c++17",)  # nvcc and NVRTC both take these; IEEE arithmetic is the default of both and must stay
# By file name prefix. An `a` target has the chip's own instructions and runs on no other chip.
TARGETS = {
    "sm90": ("90a",),
    "sm100": ("100a", "103a"),
    "sm120": ("120a",),
    "smxx": ("90a", "100a", "103a", "120a"),
}


def sources() -> list[Path]:
    """Every kernel file."""
    return sorted(FOLDER.glob("*.cu"))


def targets(source: Path) -> tuple[str, ...]:
    """Targets that the file's prefix promises, as "90a"; ValueError for an unknown prefix."""
    prefix = source.name.split("_")[0]
    if prefix not in TARGETS:
        raise ValueError(f"{source.name}: got prefix {prefix!r}, wanted one of {', '.join(TARGETS)}")
    return TARGETS[prefix]


def target_for(source: Path, capability: int) -> str:
    """The target to compile for on a GPU of `capability` (90 for sm_90); ValueError if the file serves none there."""
    if f"{capability}a" in targets(source):
        return f"{capability}a"
    if source.name.startswith("smxx_"):  # plain code for a GPU that no wheel carries a cubin for
        return str(capability)
    raise ValueError(f"{source.name}: got a GPU of sm_{capability}, wanted sm_{' or sm_'.join(targets(source))}")


def cubin_name(source: Path, target: str) -> str:
    """File name with a hash of the source, the headers it includes and the flags: a stale cubin has another name."""
    files = [source]
    for file in files:  # grows while it runs: headers include headers
        for include in re.findall(r'^\s*#include "(.+)"', file.read_text(), re.MULTILINE):
            if FOLDER / include not in files:
                files.append(FOLDER / include)
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in files:
        digest.update(file.read_bytes())
    return f"{source.stem}.sm_{target}.{digest.hexdigest()[:16]}.cubin"


def compile_with_nvcc(source: Path, target: str) -> tuple[bytes, str]:
    """The cubin and ptxas' report; RuntimeError with nvcc's message."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        command = ["nvcc", "-cubin", *FLAGS, f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas", "-v"]
        run = subprocess.run([*command, f"-I{FOLDER}", "-o", cubin, source], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{source.name} for sm_{target}: nvcc failed\n{run.stdout}{run.stderr}".rstrip())
        return cubin.read_bytes(), run.stdout + run.stderr


def write(path: Path, content: bytes) -> None:
    """Write beside the final name, then rename, so that no reader ever sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are their owner's alone, a wheel or cache need not be
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def build(out: Path, jobs: int) -> bool:
    """Compile everything into `out`, printing a row a cubin; False if one failed. Drops cubins of older sources."""
    out.mkdir(parents=True, exist_ok=True)
    work = [(source, target) for source in sources() for target in targets(source)]
    names = {cubin_name(*item) for item in work}
    for cubin in out.glob("*.cubin"):
        if cubin.name not in names:
            cubin.unlink()
    print(f"{'file':<28}{'target':<9}{'seconds':>8}{'bytes':>9}{'registers':>11}{'spilled bytes':>15}")
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for (source, target), result in zip(work, pool.map(lambda item: _compile(*item, out), work)):
            if isinstance(result, str):
                failed.append(result)
                print(f"{source.name:<28}{target:<9}  FAILED")
            else:
                seconds, size, registers, spilled = result
                print(f"{source.name:<28}{target:<9}{seconds:>8.1f}{size:>9}{registers:>11}{spilled:>15}")
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return not failed


def _compile(source: Path, target: str, out: Path) -> tuple[float, int, int, int] | str:
    """Seconds, cubin bytes, and the most registers and spilled bytes of any kernel in it; or what went wrong."""
    start = time.monotonic()
    try:
        cubin, report = compile_with_nvcc(source, target)
    except RuntimeError as error:
        return str(error)
    write(out / cubin_name(source, target), cubin)
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
    spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", report)))
    return time.monotonic() - start, len(cubin), registers, spilled


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517: compile first where nvcc is found; without it the wheel carries sources alone, compiled when used."""
    from setuptools import build_meta

    if shutil.which("nvcc") and not build(CUBINS, os.cpu_count() or 1):
        raise RuntimeError("csrc: nvcc could not compile every kernel, see above")
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def __getattr__(name: str):
    """The other hooks of PEP 517 and 660 are setuptools' own, imported when asked for: the driver has no use for it."""
    if name.startswith(("build_", "get_requires_for_", "prepare_metadata_for_")):
        from setuptools import build_meta

        return getattr(build_meta, name)
    raise AttributeError(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile every csrc/*.cu with nvcc for every target that its name prefix promises.",
        epilog="example: python csrc/build.py --jobs 2 --out cubins",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once (default: all cores)")
    parser.add_argument("--out", type=Path, default=CUBINS, help="folder for the cubins (default: csrc/cubins)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, wanted at least 1")
    if not shutil.which("nvcc"):
        print("error: nvcc is not on PATH; it comes with the CUDA toolkit 13", file=sys.stderr)
        return 1
    return 0 if build(options.out, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
