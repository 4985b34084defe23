"""What bench.accuracy measured, as tables for a terminal or a README and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

SOURCE = "BF16"  # what the others are compared with, where the cache holds the model's dtype
LEVELS = [percent / 100 for percent in range(1, 100, 2)]  # quantiles of the KL of single tokens
# Okabe and Ito's colours, told apart with any kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def report(result: dict) -> str:
    """Two Markdown tables with 95 % intervals, the comparisons and the baseline."""
    rows, depths = result["rows"], max(len(row["drafts"]) for row in result["rows"])
    lines = [
        f"{result['device']}, {result['dtype']} compute: {result['documents']} documents of {result['tokens']:,} "
        f"tokens, {result['digits']} digits",
        "KL in nats a token; [95 % interval, by bootstrap over documents or pictures]",
        "",
    ]
    lines += _table(
        ("weights", "KV cache", "perplexity", "mean KL to BF16", "median", "99 %", "max", "same top token"),
        (
            (
                *_names(row),
                _cell(row["perplexity"], "{:.2f}".format),
                _cell(row["kl"], _three),
                *(_three(row["kl"][part]) for part in ("median", "99 %", "max")),
                _cell(row["agreement"], _percent),
            )
            for row in rows
        ),
    )
    head = ("weights", "KV cache", "single digits read", f"strips of {result['strip']} read")
    lines += ["", *_table(
        (*head, *(f"draft {depth + 1} kept" for depth in range(depths))),
        ((*_names(r), *(_cell(x, _percent) for x in (r["digits"], r["strips"], *r["drafts"]))) for r in rows),
    ), ""]  # fmt: skip
    for c in result["comparisons"]:
        ratio, difference = _cell(c["ratio"], "{:.3f}".format), _cell(c["difference"], "{:+.3g}".format)
        lines.append(f"{c['weights']} against {c['against']}: mean KL times {ratio}, difference {difference}")
    if result["baseline"]:
        lines.append(f"baseline: {result['baseline']['name']}, perplexity {result['baseline']['perplexity']:.2f}")
    return "\n".join(lines)


def _names(row: dict) -> tuple[str, str]:
    return row["weights"], row["kv_cache"]


def _cell(figure: dict | None, form: Callable[[float], str]) -> str:
    return "-" if figure is None else "{} [{}, {}]".format(*map(form, (figure["value"], *figure["interval"])))


def _three(x: float) -> str:
    return f"{x:#.3g}" if x else "0"


def _percent(x: float) -> str:
    return f"{x:.1%}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in table]
    return [f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:])]


def plot(result: dict, file: Path) -> None:
    """Mean KL of each variant with its interval, and how the KL of tokens is spread; the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    style = {"svg.hashsalt": "step-kernels", "font.size": 9, "axes.spines.right": False, "axes.spines.top": False}
    names = list(dict.fromkeys(row["weights"] for row in result["rows"]))
    with matplotlib.rc_context(style):
        figure, (means, tokens) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for row in result["rows"]:
            if _names(row) == (SOURCE, "model"):
                continue
            place, fp8 = names.index(row["weights"]), row["kv_cache"] == "fp8"
            colour = COLOURS[place % len(COLOURS)]
            kl, (low, high) = row["kl"]["value"], row["kl"]["interval"]
            means.errorbar(
                kl, place + (0.15 if fp8 else -0.15), xerr=[[kl - low], [high - kl]], color=colour, capsize=4,
                marker="o", markersize=4, markerfacecolor="white" if fp8 else colour,
            )  # fmt: skip
            spread = [max(x, 1e-9) for x in row["kl"]["quantiles"]]  # rounding may leave an equal token below 0
            tokens.plot(spread, [100 * level for level in LEVELS], color=colour, linestyle="--" if fp8 else "-")
        means.set(xscale="log", xlabel="mean KL to BF16, nats a token", yticks=range(len(names)), yticklabels=names)
        means.xaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
        for i, label in enumerate(means.get_yticklabels()):
            label.set(color=COLOURS[i % len(COLOURS)], fontweight="bold")
        means.set_title("filled: KV cache in the model's dtype, open: FP8", fontsize=9)
        means.invert_yaxis()
        tokens.set(xscale="log", xlabel="KL of a token, nats", ylabel="% of tokens below", ylim=(0, 100))
        tokens.set_title("solid: KV cache in the model's dtype, dashed: FP8", fontsize=9)
        for axes in (means, tokens):
            axes.grid(alpha=0.25)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)
