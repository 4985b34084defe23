"""The picture of an end-to-end result."""

from __future__ import annotations

from pathlib import Path


def plot(result: dict, file: Path) -> None:
    """Decode steps by batch and prefill by length, each beside its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "step-kernels", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        cases = result["decode"]
        for axis, names, bars, unit, what in (
            (
                left,
                list(cases),
                [("measured", "ms"), ("what its bytes allow", "floor_ms")],
                "ms a decode step",
                "requests x context",
            ),
            (
                right,
                list(result["prefill"]),
                [("measured", "tokens_s"), ("what its FLOP allow", "floor_tokens_s")],
                "tokens/s",
            ),
        ):
            found = cases if axis is left else result["prefill"]
            for i, (label, key) in enumerate(bars):
                places = [place + 0.4 * i for place in range(len(names))]
                axis.bar(places, [found[name][key] for name in names], 0.38, label=label)
            axis.set_xticks([place + 0.2 for place in range(len(names))], names, rotation=30)
            axis.set(ylabel=unit, xlabel=what, title=f"{result['gpu']}, {result['layers']} layers")
            axis.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)
