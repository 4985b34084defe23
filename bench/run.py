"""python -m bench.run [OP ...] [--save]: what each op costs on this machine's GPU, beside its floor and its peers."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import torch

from step_kernels.cli import Parser
from step_kernels.testing import relative_error

from . import timing

# A file of this folder each: CASES, inputs, work, contenders, and error or exact. Where peers have tensors of their own
# also PEERS, peers and compile_peers.
OPS = (
    "kv_append", "linear", "moe_router", "moe_topk", "nvfp4_gptq", "nvfp4_linear", "nvfp4_moe", "nvfp4_quantize",
    "nvfp4_search", "paged_attention", "rms_norm", "swiglu",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
WRONG = 0.02  # a relative error that rounding to bf16 twice, 0.003, does not explain


def lines(op: str):
    """A result of each case, as a line of bench/results holds it; None for a case the op failed."""
    bench = importlib.import_module(f".{op}", __package__)
    missing = _missing(getattr(bench, "PEERS", {}))
    if hasattr(bench, "compile_peers") and not missing:
        try:
            bench.compile_peers()
        except RuntimeError as problem:
            print(f"compiling peers: {_line(problem)}", flush=True)
    for name, case in bench.CASES.items():
        torch.manual_seed(0)
        torch.compiler.reset()  # or the peer of a later case would be a slower kernel for any shape
        arguments = bench.inputs(case)
        measured = dict(_measured(bench, name, case, arguments))
        if "ours" not in measured:
            yield None
            continue
        us, spread, error = measured.pop("ours")
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
            "memory_share": round(memory_us / us, 4),
            "matrix_share": round(matrix_us / us, 4),
            "error": bench.error(*arguments) if error is None else error,
            "peers": {who: round(time, 3) for who, (time, _, _) in measured.items()},
            "peer_spreads": {who: round(spread, 4) for who, (_, spread, _) in measured.items()},
            "peer_errors": {who: error for who, (_, _, error) in measured.items() if error is not None},
        }


def _missing(peers: dict[str, str]) -> set[str]:
    """Say which peers can be imported and which cannot, and why; `peers` has a module for each distribution."""
    found, missing = [], {}
    for name, module in peers.items():
        try:
            importlib.import_module(module, __package__)
            found.append(f"{name} {importlib.metadata.version(name)}")
        except (ImportError, OSError, RuntimeError) as problem:  # a library that a wheel does not bring
            missing[name] = _line(problem)
    if peers:
        print(f"peers: {', '.join(found)}; missing: {'; '.join(f'{n} ({p})' for n, p in missing.items()) or 'none'}")
    return set(missing)


def _measured(bench, case_name: str, case, arguments: tuple):
    """(who, (median µs, spread, relative error or None)) of the op, then of its peers; says who fails or is wrong."""
    contenders = {who: lambda call=call: (call, arguments) for who, call in bench.contenders().items()}
    contenders |= bench.peers(case, *arguments) if hasattr(bench, "peers") else {}
    rows, wanted = bench.exact(case, *arguments) if hasattr(bench, "exact") else (None, None)
    for who, prepare in contenders.items():
        try:
            call, own = prepare()
            error = None if wanted is None else relative_error(call(*own)[rows], wanted)
            if error is not None and not error < WRONG:
                raise ValueError(f"wrong, relative error {error:.2g}: not timed")
            yield who, (*timing.measure(call, timing.copies(own)), error)
        except Exception as problem:  # the others are measured all the same
            if who == "ours" or not isinstance(problem, ImportError):  # which peers are missing is said at the start
                print(f"{case_name}: {who}: {_line(problem)}", flush=True)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def row(line: dict) -> str:
    """The table's row: share of both ceilings, relative error, and how many times as long each peer takes."""
    us = line["us"]
    matrix = f"{line['matrix_share']:>5.0%} matrix" if line["flops"] else 13 * " "
    peers = "  ".join(
        f"{who} {time:.1f} us ±{line['peer_spreads'][who]:.0%} ({time / us:.2f}x)"
        for who, time in line["peers"].items()
    )
    shares = f"{line['memory_share']:>6.0%} memory {matrix}"
    return f"{line['case']:<18}{us:>9.2f} us ±{line['spread']:>4.0%}{shares}   error {line['error']:.1e}   {peers}"


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
    memory, matrix = timing.memory_ceiling() / 1e12, timing.matrix_ceiling() / 1e12
    print(f"{gpu}: memory {memory:.2f} TB/s, cuBLAS bf16 8192^3 {matrix:.0f} TFLOP/s; shares are of these two")
    failed = False
    for op in options.op or OPS:
        print(op, flush=True)
        for line in lines(op):
            if line is None:
                failed = True
                continue
            print(row(line), flush=True)
            if options.save:
                RESULTS.mkdir(exist_ok=True)
                with open(RESULTS / f"{gpu.lower().replace(' ', '-')}.jsonl", "a") as file:
                    file.write(json.dumps({**line, **where}) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
