"""python -m bench.run [OP ...] [--save]: what each op costs on this machine's GPU, beside its floor and its peers."""

from __future__ import annotations

import datetime
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from step_kernels.cli import Parser

from . import timing

# a file of this folder each: CASES, inputs, work, contenders, error
OPS = ("kv_append", "moe_topk", "nvfp4_linear", "nvfp4_moe", "nvfp4_quantize", "paged_attention", "rms_norm", "swiglu")
RESULTS = Path(__file__).parent / "results"


def lines(op: str):
    """A result of each case, as a line of bench/results holds it."""
    bench = importlib.import_module(f".{op}", __package__)
    for name, case in bench.CASES.items():
        torch.manual_seed(0)
        torch.compiler.reset()  # or the peer of a later case would be a slower kernel for any shape
        arguments = bench.inputs(case)
        inputs = timing.copies(arguments)
        measured = {who: timing.measure(call, inputs) for who, call in bench.contenders().items()}
        (us, spread), *_ = measured.values()
        size, flops = bench.work(case)
        memory_us = size / timing.memory_ceiling() * 1e6
        matrix_us = flops / timing.matrix_ceiling() * 1e6 if flops else 0.0
        by_matrix = matrix_us > memory_us
        rate = timing.matrix_ceiling() if by_matrix else timing.memory_ceiling()
        yield {
            "op": op,
            "case": name,
            "us": round(us, 3),
            "spread": round(spread, 4),
            "bytes": size,
            "flops": flops,
            "share": round(max(memory_us, matrix_us) / us, 4),
            "ceiling": f"{rate / 1e12:.4g} {'TFLOP/s' if by_matrix else 'TB/s'}",
            "error": bench.error(*arguments),
            "peers": {who: round(time, 3) for who, (time, _) in list(measured.items())[1:]},
        }


def row(line: dict) -> str:
    """The table's row: rates, share of the ceiling, and how many times as long each peer takes."""
    flops, us = line["flops"], line["us"]
    rate = (
        f"{flops / us / 1e6:7.1f} TFLOP/s"
        if line["ceiling"].endswith("FLOP/s")
        else f"{line['bytes'] / us / 1e3:7.0f} GB/s"
    )
    peers = "  ".join(f"{who} {time:.1f} us ({time / us:.2f}x)" for who, time in line["peers"].items())
    return f"{line['case']:<16}{us:>9.2f} us ±{line['spread']:>4.0%}{rate}{line['share']:>6.0%}   {peers}"


def machine() -> dict:
    """Where and when: commit, torch, driver, date."""
    return {
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "torch": torch.__version__,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": datetime.date.today().isoformat(),
    }


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.splitlines()[0] if run.returncode == 0 and run.stdout else "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.run",
        description="Measure ops on this machine's GPU against ceilings measured in the same run and against peers.",
        epilog="example: python -m bench.run moe_topk --save",
    )
    parser.add_argument("op", nargs="*", metavar="OP", help=f"{', '.join(OPS)} (default: all)")
    parser.add_argument("--save", action="store_true", help="append the results to bench/results/<gpu>.jsonl")
    options = parser.parse_args(arguments)
    for op in options.op:
        if op not in OPS:
            parser.error(f"OP: got {op!r}, wanted one of {', '.join(OPS)}")
    try:
        timing.require_gpu()
    except timing.NoGPU as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    where = machine()  # before the first line saved makes the checkout dirty
    gpu = torch.cuda.get_device_name()
    print(
        f"{gpu}: memory {timing.memory_ceiling() / 1e12:.2f} TB/s; share is of that, or of the matrix rate if it binds"
    )
    for op in options.op or OPS:
        print(op)
        for line in lines(op):
            print(row(line), flush=True)
            if options.save:
                RESULTS.mkdir(exist_ok=True)
                with open(RESULTS / f"{gpu.lower().replace(' ', '-')}.jsonl", "a") as file:
                    file.write(json.dumps({**line, **where}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
