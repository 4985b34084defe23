"""The picture of an end-to-end result."""

from __future__ import annotations

from pathlib import Path


def plot(result: dict, file: Path) -> None:
    """Decode steps by batch and prefill by length, each beside what bytes or FLOP allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "step-kernels", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        _bars(left, result["decode"], {"ms": "measured", "floor_ms": "what its bytes allow"})
        left.set(ylabel="ms a decode step", xlabel="requests x context")
        _bars(right, result["prefill"], {"tokens_s": "measured", "floor_tokens_s": "what its FLOP allow"})
        right.set(ylabel="tokens/s", xlabel="prompt tokens")
        figure.suptitle(f"{result['gpu']}, {result['layers']} layers, {result['weights']}")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)


def _bars(axis, cases: dict, labels: dict[str, str]) -> None:
    for i, (key, label) in enumerate(labels.items()):
        axis.bar([place + 0.4 * i for place in range(len(cases))], [c[key] for c in cases.values()], 0.38, label=label)
    axis.set_xticks([place + 0.2 for place in range(len(cases))], list(cases), rotation=30)
    axis.legend(frameon=False)
