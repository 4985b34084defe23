"""python -m step_kernels: what this machine offers, and which kernel would serve each op."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch

from . import __version__, registry
from .cli import Parser, close_quietly
from .testing import sample_arguments


def versions() -> list[tuple[str, str]]:
    """(what, its version) of everything that decides which kernels run."""
    found = [("step_kernels", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return [*found, ("nvcc", shutil.which("nvcc") or "not on PATH")]


def gpus() -> list[tuple[str, str]]:
    """(device, name and capability), or the one line of a machine without a GPU."""
    if not torch.cuda.is_available():
        return [("GPU", "no GPU: ops run their references")]
    devices = range(torch.cuda.device_count())
    capability = registry.compute_capability
    return [(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{capability(i)}") for i in devices]


def matrix() -> str:
    """Markdown: the kernel that serves each op at the model's shapes, by GPU and activation dtype."""
    gpus = {"Ampere": (80,), "Ada": (89,), "Hopper": (90,), "Blackwell": (100, 103), "RTX Blackwell": (120,)}
    heads = [f"{name} (sm_{', '.join(map(str, chips))})" for name, chips in gpus.items()]
    lines = ["| op | activations | " + " | ".join(heads) + " | CPU |", "|---" * (len(heads) + 3) + "|"]
    for op in registry.ops():
        rows: dict[tuple, list[str]] = {}
        for name in ("bfloat16", "float16", "float32"):
            # As a model holds its weights: on Hopper prepared for the kernels there, which take bf16.
            plain, hopper = (sample_arguments(op, getattr(torch, name), p) for p in (False, name == "bfloat16"))
            chosen = [
                dict.fromkeys(registry.choice(op, chip, *(hopper if chip == 90 else plain)) for chip in chips)
                for chips in gpus.values()
            ]
            rows.setdefault(tuple(" / ".join(names) for names in chosen), []).append(name)
        for chosen, names in rows.items():
            what = "all" if len(names) == 3 else ", ".join(names)
            lines.append(f"| `{op}` | {what} | " + " | ".join(chosen) + " | reference |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m step_kernels",
        description="Print versions, GPUs, and for each op which kernel serves it and why the others do not.",
        epilog="example: python -m step_kernels",
    )
    parser.add_argument(
        "--matrix", action="store_true", help="print the support table of every GPU instead, as markdown"
    )
    if parser.parse_args(arguments).matrix:
        try:
            print(matrix())
        except ImportError as error:  # what a kernel accepts is said beside it
            print(f"error: --matrix: {error}; wanted triton and cuda-bindings installed", file=sys.stderr)
            return 1
        return 0
    try:
        for what, found in versions() + gpus():
            print(f"{what:<18} {found}")
        here = registry.compute_capability(0) if torch.cuda.is_available() else None
        for op in registry.ops():
            print()
            # At the model's shapes, with weights as it holds them there: tables may depend on both.
            shapes = sample_arguments(op, torch.bfloat16, here == 90) if here else ()
            registry.explain(op, *shapes, capability=here)
        sys.stdout.flush()
    except BrokenPipeError:
        close_quietly()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
