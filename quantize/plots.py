"""The report's plots, each as an <svg> for a page that may be light or dark: text and axes have the page's colour.

matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np

from step_kernels.nvfp4 import E4M3_MAX

from .figures import OFFSETS

BELOW = "#E0501A"  # what lies below a heat map's scale
# Okabe and Ito's, the blue lighter, without black and yellow: both are to be seen on white and on black.
_COLOURS = ("#3A8FD0", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK = "#010203"  # becomes currentColor
_WIDTH = 10  # inches, of a page's width
SUBNORMAL = 8  # codes of e4m3 below it are subnormal


def heat_maps(panels: dict[str, np.ndarray], layers: list[int], low: float, high: float, label: str, log: bool) -> str:
    """[layers, experts] each, NaN where there is nothing: one below the other, with one colour scale."""
    experts = next(iter(panels.values())).shape[1]
    height = max(1.1, 0.055 * len(layers))

    def draw(figure) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import NullFormatter

        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        colours = colormaps["viridis"].with_extremes(under=BELOW, bad="#8888")
        norm = (LogNorm if log else Normalize)(low, high)
        for axes, (title, values) in zip(all_axes[:, 0], panels.items()):
            image = axes.imshow(values, colours, norm, aspect="auto", interpolation="none")
            step = 5 if len(layers) > 10 else 1
            ticks = [i for i, layer in enumerate(layers) if layer % step == 0]
            axes.set_yticks(ticks, [layers[i] for i in ticks])
            axes.set(ylabel="layer")
            axes.set_title(title, loc="left")
            axes.tick_params(length=2)
        step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if experts // s <= 18)
        axes.set_xticks(range(0, experts, step))
        axes.set(xlabel="expert")
        bar = figure.colorbar(image, ax=all_axes[:, 0].tolist(), extend="min", label=label, aspect=30, pad=0.01)
        if log:
            bar.ax.yaxis.set(major_formatter="{x:,.0f}", minor_formatter=NullFormatter())
        bar.solids.set_rasterized(True)
        bar.outline.set_visible(False)

    return _svg(draw, (height + 0.3) * len(panels) + 0.4)


def scale_codes(modules: dict[str, dict[str, np.ndarray]]) -> str:
    """Module -> projection -> blocks i64 [128] by the code of their scale."""

    def draw(axes, projections: dict[str, np.ndarray]) -> None:
        for (name, counts), colour in zip(projections.items(), _cycle()):
            share = 100 * counts[1:127] / max(1, counts.sum())
            axes.stairs(
                np.where(share > 0, share, np.nan), np.arange(0.5, 127), color=colour, label=name, baseline=None
            )
        axes.axvspan(0.5, SUBNORMAL - 0.5, color=_INK, alpha=0.08, linewidth=0)
        values = [2.0**-9, 2.0**-6, 2.0**-4, 0.25, 1, 4, 16, 64, E4M3_MAX]
        names = ["2⁻⁹", "2⁻⁶", "2⁻⁴", "¼", "1", "4", "16", "64", "448"]
        axes.set_xticks([1 if v == values[0] else 126 if v == E4M3_MAX else 56 + 8 * np.log2(v) for v in values], names)
        axes.set(yscale="log", xlim=(0.5, 126.5), xlabel="block scale (one step for each e4m3 code)")
        axes.yaxis.set_major_formatter("{x:g}")

    return _by_module(modules, draw, "blocks, %")


def offsets(modules: dict[str, dict[str, np.ndarray]]) -> str:
    """Module -> projection -> blocks i64 [len(OFFSETS)] by their scale's offset from that of `max`."""
    used = sum(counts for projections in modules.values() for counts in projections.values()) > 0
    first, last = (int(i) for i in np.flatnonzero(used)[[0, -1]]) if used.any() else (8, 8)
    shown = range(min(first, 6), max(last, 14) + 1)  # -2 to 6, what the search for the least error looks at, or more

    def draw(axes, projections: dict[str, np.ndarray]) -> None:
        width = 0.8 / len(projections)
        for i, ((name, counts), colour) in enumerate(zip(projections.items(), _cycle())):
            share = 100 * counts / max(1, counts.sum())
            places = np.arange(len(shown)) + (i - (len(projections) - 1) / 2) * width
            axes.bar(places, share[shown.start : shown.stop], 0.92 * width, color=colour, label=name)
        ends = {0: "≤ −8", len(OFFSETS) - 1: "≥ 8"}
        names = [ends.get(i, f"{OFFSETS[i]:+d}".replace("-", "−") if OFFSETS[i] else "0") for i in shown]
        axes.set_xticks(range(len(shown)), names)
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel="codes above the one of amax / 6")

    return _by_module(modules, draw, "blocks, %")


def by_layer(modules: dict[str, dict[str, np.ndarray]], label: str, log: bool = False) -> str:
    """Module -> projection -> [layers, 4]: the layer and the least, median and largest value of its matrices."""
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes, projections: dict[str, np.ndarray]) -> None:
        for (name, rows), colour in zip(projections.items(), _cycle()):
            layer, low, middle, high = rows.T
            axes.fill_between(layer, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(layer, middle, color=colour, label=name, linewidth=1.2, marker="o", markersize=2)
        axes.set(xlabel="layer", yscale="log" if log else "linear")
        if log:
            every = np.concatenate([rows[:, 1:].ravel() for rows in projections.values()])
            axes.set_ylim(np.nanmin(every) / 1.5, np.nanmax(every) * 1.5)  # room for two of the ticks at least
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set(major_formatter="{x:.1e}", minor_formatter=NullFormatter())
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _by_module(modules, draw, label)


def _by_module(modules: dict[str, dict[str, np.ndarray]], draw_one: Callable, label: str) -> str:
    """A plot a module, two in a row."""
    columns = min(2, len(modules))
    rows = -(-len(modules) // columns)

    def draw(figure) -> None:
        all_axes = figure.subplots(rows, columns, squeeze=False)
        for axes in all_axes.flat[len(modules) :]:
            axes.remove()
        for axes, (module, projections) in zip(all_axes.flat, modules.items()):
            draw_one(axes, projections)
            axes.set_title(module, loc="left")
            axes.set(ylabel=label)
            axes.grid(axis="y", alpha=0.25, linewidth=0.5)
            axes.set_axisbelow(True)
            axes.legend(frameon=False, handlelength=1.2)

    return _svg(draw, 2.1 * rows + 0.2)


def _cycle() -> list[str]:
    return list(_COLOURS) * 3


def _svg(draw: Callable, height: float) -> str:
    """What draw(figure) draws, the same bytes every time; nothing in it names the network."""
    import matplotlib
    from matplotlib.backends import backend_svg  # noqa: F401  or its settings are unknown
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = dict.fromkeys(ink, _INK) | {
        "svg.fonttype": "none", "svg.hashsalt": "step-kernels", "font.size": 8, "axes.titlesize": 8,
        "axes.titleweight": "bold", "axes.spines.right": False, "axes.spines.top": False, "axes.linewidth": 0.6,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "ytick.minor.size": 0,
        "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing, dpi=100)
    svg = text.getvalue().replace(_INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index("<svg") :].partition(">")[2]
    for useless in (r"<style.*?</style>", r' id="[\w.]*_\d+"', r" font-family: [^;]*;", r"(?<=,)\n"):
        body = re.sub(useless, "", body, flags=re.S)
    return f"<svg {box}>{body}"
