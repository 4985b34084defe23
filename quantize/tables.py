"""The report's sections that are words and tables, each as HTML, '' where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

import numpy as np

from .errors import Errors, decibel
from .figures import Figures, layer_order

WORST = 20  # matrices, and problems, that are listed


def heading(figures: Figures) -> str:
    """What was made, and the figures that decide."""
    weights, source, result = (sum(getattr(k, n) for k in figures.kinds) for n in ("weights", "source", "result"))
    facts = []
    problems = figures.problems or []
    if figures.problems is None:
        facts.append(("verification", "not done", "python -m quantize.verify does it"))
    elif problems:
        text = f'<span class="bad">{len(problems):,} problem{"s" * (len(problems) > 1)}</span>'
        facts.append(("verification", text, "listed below"))
    else:
        facts.append(("verification", "passed", "headers, scales, copies, excludes"))
    errors = _errors(figures)
    if any(power for _, power in errors.sums.values()):
        relative = errors.relative()
        facts.append(("error of the weights", f"{_decibel(relative)} dB", f"SQNR; relative MSE {relative:.6f}"))
    if weights:
        ratio = f", a ratio of {source / result:.2f}" if source else ""
        facts.append(("size", _size(result), f"from {_size(source)}{ratio}"))
        facts.append(
            ("bits a weight", f"{8 * result / weights:.2f}", f"from {8 * source / weights:.2f}; scales included")
        )
    cells = (f"<div><dt>{what}</dt><dd>{value}<small>{more}</small></dd></div>" for what, value, more in facts)
    listed = [escape(p) for p in problems[:WORST]]
    if len(problems) > WORST:
        listed.append(f"and {len(problems) - WORST:,} more")
    items = "".join(f"<li>{p}</li>" for p in listed)
    return (
        f'<h1>{escape(figures.title)}</h1><p class="soft">A conversion to NVFP4: 4-bit codes (e2m1) in blocks of 16, '
        f"an 8-bit scale (e4m3) a block, a 32-bit scale a matrix.</p><dl>{''.join(cells)}</dl>"
        + (f'<h2>Problems</h2><p>What the verification found.</p><ul class="bad wrap">{items}</ul>' if items else "")
    )


def sizes(figures: Figures) -> str:
    """Bytes by kind of tensor, and what was left as it was."""
    if not figures.kinds:
        return ""
    names = ("tensors", "weights", "source", "result")
    everything = [sum(getattr(kind, name) for kind in figures.kinds) for name in names]
    unit, prefix, many = (1e9, "GB", "billions") if everything[2] >= 1e10 else (1e6, "MB", "millions")

    def numbers(tensors: int, weights: int, source: int, result: int) -> list[str]:
        ratio = f"{source / result:.2f}" if source and result else "–"
        bits = f"{8 * result / weights:.2f}" if weights else "–"
        counts = (f"{x / unit:,.3f}" if x >= unit / 1000 or not x else "< 0.001" for x in (weights, source, result))
        return [f"{tensors:,}", *counts, ratio, bits]

    rows = [[k.name, k.precision, *numbers(k.tensors, k.weights, k.source, k.result), k.why] for k in figures.kinds]
    rows.append(["all", "", *numbers(*everything), ""])
    head = ["what", "result in", "tensors", f"weights, {many}", f"source, {prefix}", f"result, {prefix}"]
    return (
        "<h2>Sizes, and what was left as it was</h2><p>Ratio is source to result, and bits a weight include block and "
        "matrix scales; a reason in the last column means that the bytes are those of the source.</p>"
        + table([*head, "ratio", "bits a weight", "why not in NVFP4"], rows, "llrrrrrrw", total=True)
    )


def conversion(figures: Figures) -> str:
    """Settings and cost."""
    rows = list(figures.about.items())
    if figures.seconds:
        before = "; an earlier run, since resumed, had done the rest" if figures.done_before else ""
        rates = (f"{count / figures.seconds / 1e9:.2f} GB/s" for count in (figures.bytes_in, figures.bytes_out))
        rows += [
            ("time", f"{_seconds(figures.seconds)}, then {_seconds(figures.verify_seconds)} to verify{before}"),
            ("read", f"{_size(figures.bytes_in)}, {next(rates)}"),
            ("written", f"{_size(figures.bytes_out)}, {next(rates)}"),
            ("peak memory", f"{_size(figures.host_peak)} of the host's"),
        ]
        if figures.gpu_peak:
            rows.append(("peak memory of a GPU", _size(figures.gpu_peak)))
    return "<h2>How it was made</h2>" + table((), rows, "lw") if rows else ""


def layers(figures: Figures) -> str:
    """SQNR and relative MSE by layer and projection, as tables in colours, one a module."""
    errors = _errors(figures)
    sums = {key: s for key, s in errors.sums.items() if s[1]}
    found = [decibel(errors.relative([key])) for key, (error, _) in sums.items() if error]
    if not found:
        return ""
    low, high = min(*found, max(found) - 1), max(found)  # 1 dB at least: less is no difference to look at

    def cell(keys: list) -> str:
        keys = [key for key in keys if key in sums]
        if not keys:
            return '<td class="r">–</td>'
        relative = errors.relative(keys)
        red = 0.6 * (high - decibel(relative)) / (high - low) if relative else 0
        colour = f' style="background:rgba(224,80,26,{red:.2f})"' if red >= 0.005 else ""
        return f'<td class="r"{colour}>{_decibel(relative)}<small>{relative:.6f}</small></td>'

    modules: dict[str, list[str]] = {}
    for _, projection in sums:
        names = modules.setdefault(projection.rpartition(".")[0] or projection, [])
        names += [] if projection in names else [projection]
    tables = []
    for module, projections in modules.items():
        mine = sorted({layer for layer, p in sums if p in projections}, key=layer_order)
        rows = [(layer_name(n), [[(n, p)] for p in projections]) for n in mine]
        rows.append(("all", [[key for key in sums if key[1] == p] for p in projections]))
        head = "".join(f'<th class="r">{escape(p.rpartition(".")[2])}</th>' for p in projections)
        body = "".join(f"<tr><td>{name}</td>{''.join(map(cell, cells))}</tr>" for name, cells in rows)
        tables.append(
            f'<table class="heat"><caption>{escape(module)}</caption><thead><tr><th>layer</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )
    return (
        "<h2>Error by layer and projection</h2><p>Each cell has the signal-to-quantization-noise ratio (SQNR) in dB "
        "and the relative MSE; the redder, the larger the error. Gaussian weights give 20.4 dB with the search "
        "<code>max</code>, 21.2 with <code>four-six</code> and 21.8 with <code>mse</code>.</p>"
        f'<div class="side">{"".join(tables)}</div>'
    )


def worst(figures: Figures) -> str:
    """The matrices with the lowest SQNR."""
    found = []
    for (layer, projection), weight in figures.weights.items():
        values = weight.sqnr
        lowest = [int(m) for m in np.argsort(values, kind="stable")[:WORST] if np.isfinite(values[m])]  # NaN comes last
        found += [((values[m], layer_order(layer), projection, m), layer, weight) for m in lowest]
    if not found:
        return ""
    calibrated = any(weight.tokens.any() for weight in figures.weights.values())
    rows = []
    for (value, _, projection, matrix), layer, weight in sorted(found, key=lambda row: row[0])[:WORST]:
        error, power = weight.errors[matrix]
        expert = str(matrix) if len(weight.scales) > 1 else "–"
        row = [layer_name(layer), projection, expert, f"{value:.2f}", f"{error / power:.6f}"]
        row.append(f"{weight.scales[matrix]:.3e}" if weight.scales[matrix] else "–")  # FP8 has none
        rows.append([*row, *([f"{weight.tokens[matrix]:,}"] if calibrated else [])])
    head = ["layer", "projection", "expert", "SQNR, dB", "relative MSE", "weight_scale_2"]
    return f"<h2>The worst {len(rows)}</h2><p>The matrices with the lowest SQNR, the worst first.</p>" + table(
        [*head, *(["tokens"] if calibrated else [])], rows, "rlrrrrr"
    )


def table(head: Iterable[str], rows: list, columns: str, total: bool = False) -> str:
    """`columns`: for each r (numbers, to the right), l or w (text that may wrap); `total`: the last row sums up."""
    kinds = {"r": ' class="r"', "l": "", "w": ' class="wrap"'}

    def line(cells: Iterable[str], tag: str, more: str = "") -> str:
        inner = "".join(f"<{tag}{kinds[c]}>{escape(cell)}</{tag}>" for c, cell in zip(columns, cells))
        return f"<tr{more}>{inner}</tr>"

    body = [line(row, "td", ' class="total"' if total and row is rows[-1] else "") for row in rows]
    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def layer_name(layer: int | None) -> str:
    """As tables have it."""
    return "–" if layer is None else str(layer)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _errors(figures: Figures) -> Errors:
    errors = Errors()
    for key, weight in figures.weights.items():
        errors.add(*key, *(math.fsum(column) for column in weight.errors.T))
    return errors


def _decibel(relative: float) -> str:
    return f"{decibel(relative):.2f}" if relative else "exact"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
