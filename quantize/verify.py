"""Checks a finished NVFP4 checkpoint, alone or against its source.

python -m quantize.verify DST --source SRC
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from step_kernels.cli import Parser, close_quietly
from step_kernels.model.checkpoint import Checkpoint, CheckpointError

from . import checks, measure, serving, values
from .contents import Contents, Model
from .findings import Findings
from .measure import Measured
from .plan import resolve_source

BOUND = 0.0100  # relative MSE: `max` on Gaussian weights gives .0090, `mse` .0066
GPTQ_BOUND = 0.03  # it weighs errors by inputs: up to .017 of what is right has been seen, a misread scale makes .1
_ELSEWHERE = "f, h, i, j   not checked  decoders, logits, resuming and memory are properties of programs, not of files"


@dataclass
class Report:
    """`findings`: all that is wrong or unusual; `measured`: errors against the source, if they were asked for."""

    findings: Findings = field(default_factory=Findings)
    measured: Measured = field(default_factory=Measured)

    @property
    def problems(self) -> list[str]:
        """A line each of what breaks an engine; none for a sound checkpoint."""
        return [str(f) for f in self.findings.found if f.breaks]


def verify(
    target: str | Path,
    source: str | Path | None = None,
    *,
    errors: bool = True,
    quick: bool = False,
    bound: float | None = None,
    progress: bool = False,
) -> Report:
    """Checks names, types, shapes, scales, index and metadata of folder `target`; with `source` also the copied bytes.

    `errors` measures samples of the weights against the source too, none of which may err more than `bound` (without
    one BOUND, or GPTQ_BOUND where the files say that gptq made them); `quick` reads samples of block scales and copies.
    Raises CheckpointError where a folder is none or its config.json cannot be used.
    """
    contents = Contents(target)
    original = Checkpoint(resolve_source(source)) if source is not None else None
    state = checks.State(contents, Model(contents), checks.Claims.read(contents), original)
    report = Report(state.findings)
    checks.headers(state)
    serving.excludes(state)
    serving.loaders(state)
    read = [e for name, e in state.sound.items() if name.endswith("_scale") or (original and name in state.model.left)]
    total, quiet = sum(e.end - e.begin for e in read), None if progress else True
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=quiet, leave=False) as bar:
        values.scales(state, quick, bar)
        checks.copies(state, quick, bar)
    if errors:
        if bound is None:
            bound = GPTQ_BOUND if any(of.get("search") == "gptq" for of in contents.metadata.values()) else BOUND
        report.measured = measure.error(state, bound, quiet)
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = Parser(
        prog="python -m quantize.verify",
        description="Checks an NVFP4 checkpoint of Step-3.5 or Step-3.7, whoever made it: its tensors, scales, index "
        "and config files, and what vLLM and SGLang would make of them. Reads every scale and compares every tensor "
        "that is not quantized; of the quantized weights it measures samples. Exit status 1 if an engine would fail.",
        epilog="example: python -m quantize.verify Step-3.7-Flash-NVFP4 --source Step-3.7-Flash",
    )
    parser.add_argument("target", metavar="DST", help="folder of the NVFP4 checkpoint")
    parser.add_argument(
        "--source",
        metavar="SRC",
        help="folder it was made from (or the word bundled): compares the tensors left alone byte by byte and "
        "measures how far the quantized ones are off",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only samples of block scales and of what is not quantized"
    )
    parser.add_argument("--all", action="store_true", help="name every tensor, not the first three of each fault")
    parser.add_argument(
        "--bound",
        type=float,
        help=f"the most relative MSE of a sample (default: {BOUND}, or {GPTQ_BOUND} where gptq chose the codes)",
    )
    options = parser.parse_args(arguments)
    try:
        report = verify(options.target, options.source, quick=options.quick, bound=options.bound, progress=True)
    except CheckpointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    parts = [report.findings.table() + [_ELSEWHERE], report.measured.table(), report.findings.lines(options.all)]
    count = len(report.problems)
    parts.append([f"{options.target}: {f'{count} problems' if count else 'verified'}"])
    try:
        print("\n\n".join("\n".join(lines) for lines in parts if lines), flush=True)
    except BrokenPipeError:
        close_quietly()
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
