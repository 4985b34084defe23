"""Compiles every Triton kernel for every GPU generation without a GPU; a kernel that one refuses is found in CI.

    python -m step_kernels.triton.build 90 100

What is compiled is what the `ahead_of_time()` of this folder's files yields, for the file's own `ARCHITECTURES`
where it has some. Nothing is kept: on a user's machine Triton compiles for itself.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

from ..cli import Parser

ARCHITECTURES = (80, 89, 90, 100, 103, 120)


def variants():
    """(name, architectures, kernel, argument types, constants, warps) of every variant."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name in ("__init__.py", "build.py"):
            continue
        module = importlib.import_module(f"step_kernels.triton.{path.stem}")
        served = getattr(module, "ARCHITECTURES", ARCHITECTURES)
        for kernel, types, constants, warps in getattr(module, "ahead_of_time", tuple)():
            first = next(iter(types.values())).removeprefix("*")
            yield f"{path.stem} {first} {constants}", served, kernel, types, constants, warps


def compile_variant(kernel, types: dict, constants: dict, warps: int, architecture: int, form: str = "cubin"):
    """The cubin, or "ptx", with pointers and integers taken as multiples of 16, as Triton finds Step's shapes to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = {(position[name],): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] in "*i"}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm[form]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Compile every Triton kernel for each compute capability; needs no GPU.",
        epilog="example: python -m step_kernels.triton.build 90 100",
    )
    parser.add_argument("architecture", nargs="*", type=int, help="90 for sm_90 (default: all that the kernels serve)")
    architectures = parser.parse_args(arguments).architecture or ARCHITECTURES
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: got 1, wanted it unset: the interpreter compiles nothing")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # compile, whatever was compiled before
        for name, served, *variant in variants():
            for architecture in (a for a in architectures if a in served or a not in ARCHITECTURES):
                start = time.monotonic()
                try:
                    result = f"{len(compile_variant(*variant, architecture))} bytes, {time.monotonic() - start:.1f} s"
                except Exception as error:  # of many types, from Python to MLIR
                    failed, result = True, f"FAILED: {str(error).splitlines()[-1] if str(error) else repr(error)}"
                print(f"{name} sm_{architecture}: {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
