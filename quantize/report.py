"""The report of a conversion: one HTML file without scripts that needs nothing else, for who decides to serve it."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

import step_kernels

from . import charts, tables
from .convert import Summary
from .figures import Figures
from .kinds import kinds
from .plan import Plan, UsageError
from .shards import write_file

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1d20; --soft: #62676d; --line: #d9dce0; --page: #fff; --bad: #b5370b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #9aa0a7; --line: #363a3f; --page: #15171a; --bad: #ff8a5c }
}
body { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--page); max-width: 1060px; margin: 2.5rem auto 5rem; padding: 0 1.25rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 3rem 0 .25rem }
h3 { font-size: 1rem; margin: 2rem 0 .25rem }
p { margin: .25rem 0 .75rem; max-width: 75ch }
caption { font-weight: 600; text-align: left; padding: .25rem }
.soft { color: var(--soft) }
.bad { color: var(--bad); font-weight: 600 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; line-height: 1.35 }
th, td { padding: .2rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { padding-left: .25rem }
th { font-weight: 600; vertical-align: bottom; white-space: normal }
thead th { border-bottom: 1px solid var(--soft) }
.r { text-align: right }
.wrap { white-space: normal; overflow-wrap: anywhere }
td.wrap { min-width: 15.5rem }
.total td { border-top: 1px solid var(--soft); font-weight: 600 }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: start; overflow-x: auto }
.heat td { padding: .1rem .6rem }
.heat tr:last-child td { border-top: 1px solid var(--soft); font-weight: 600 }
.heat small { color: var(--soft); padding-left: .6em }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.75rem; margin: 1.25rem 0 0 }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums }
dd small { display: block; color: var(--soft); font-size: 13px }
svg { display: block; width: 100%; height: auto; margin: .5rem 0 }
"""


def ready(path: str | Path, target: str | Path) -> None:
    """Before a conversion to `target` begins: UsageError if its report could not be drawn or written."""
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("report: matplotlib is not installed, wanted pip install 'step-kernels[bench]'")
    if path.is_dir() or not (path.parent.is_dir() or path.parent == Path(target)):
        raise UsageError(f"report: got {path}, wanted a file in a folder that exists")


def describe(
    plan: Plan, target: str | Path, device: str, summary: Summary, verified: bool, weights: dict, before: bool = False
) -> Figures:
    """The figures of a conversion that has ended. `before`: an earlier run, since resumed, had done a part."""
    about = {
        "source": str(plan.checkpoint.folder),
        "result": str(target),
        **{name.replace("_", " "): _text(value) for name, value in asdict(plan.settings).items()},
        "device": device,
        "versions": f"step-kernels {step_kernels.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "digest": plan.digest,
    }
    return Figures(
        weights=weights,
        title=Path(target).resolve().name,
        about=about,
        kinds=kinds(plan),
        precisions=plan.precisions,
        damages=plan.damages,
        problems=summary.problems if verified else None,
        bytes_in=summary.bytes_in,
        bytes_out=summary.bytes_out,
        seconds=summary.seconds,
        verify_seconds=summary.verify_seconds,
        host_peak=summary.host_peak,
        gpu_peak=summary.gpu_peak,
        done_before=before,
    )


def write(path: str | Path, figures: Figures) -> None:
    """Writes the report; CheckpointError where the disk refuses."""
    write_file(Path(path), page(figures).encode())


def page(figures: Figures) -> str:
    """The report's HTML, the same for the same figures."""
    order = (
        tables.heading, tables.sizes, tables.conversion, charts.precisions, tables.layers, charts.experts, tables.worst,
        charts.scales, charts.calibration,
    )  # fmt: skip
    parts = [section(figures) for section in order]
    if not figures.weights:
        parts.append("<p>An earlier run had finished the conversion; what it noted of the weights is gone.</p>")
    title = escape(figures.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: NVFP4 conversion</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
