"""The bundled model's card: README.md beside its weights, with the loss curve as a picture."""

from __future__ import annotations

from pathlib import Path

from . import bundled, corpus


def write_card(folder: Path, record: dict) -> None:
    """README.md and loss.png from the record that training wrote."""
    _plot(folder / "loss.png", record["curve"])
    config = bundled.config()["text_config"]
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    loads = ", ".join(f"{low:.2f} to {high:.2f}" for low, high in record["expert_load"])
    clamps = ", ".join(f"{c['gate']:.2%} / {c['up']:.2%} at {c['limit']:g}" for c in record["clamped"])
    last = record["curve"][-1]["heldout"]
    (folder / "README.md").write_text(
        f"""# Step-3.7 miniature

The small model that comes with step-kernels, in the released checkpoint's format: {record["parameters"] / 1e6:.2f} M
parameters in BF16 ({size / 1e6:.1f} MB), {config["num_hidden_layers"]} layers of two kinds, \
{config["moe_num_experts"]} experts with {config["moe_top_k"]} a token, {bundled.MTP} draft
layers, a vision encoder with crops. It was trained to be measured with: it continues and imitates documentation of
Python packages and cloud services, reads handwritten digits and drafts its own text ahead. It knows next to nothing:
what it says about a function is made up.

## Training
- Data: `python -m bench.corpus DATA`: documentation from Apache-2.0, BSD, MIT and PSF licensed packages (listed with
  versions in `bench/corpus/heldout/README.md`), {record["train_tokens"] / 1e6:.1f} M tokens, and scikit-learn's
  handwritten digits (UCI, CC BY 4.0). The held-out documents and digits were never trained on.
- Command: `{record["command"]}`: {record["seen_tokens"] / 1e6:.0f} M tokens in {record["seconds"]} s on one \
{record["machine"]}, torch {record["torch"]}.
- It was trained on rows of 512 tokens and has never seen more at once.
- Licence: Apache-2.0, as the project.

![Cross entropy by step](loss.png)

## Held out
- Perplexity {record["heldout_perplexity"]:.2f} a token over {corpus.HELD_DOCUMENTS} documents; \
{record["baseline"]["name"]}, same tokens: {record["baseline"]["perplexity"]:.2f}.
- Cross entropy of the trunk and the three draft depths: {", ".join(f"{x:.3f}" for x in last)} nats.
- Least and most loaded expert beside the mean, by MoE layer: {loads}.
- Values that the clamps of the last two layers change, gate / up, experts (2) and then share expert (3): {clamps}.

What quantization does to it, digits read and drafts kept: `python -m bench.accuracy`, table in the project's README.
"""
    )


def _plot(file: Path, curve: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [point["step"] for point in curve]
    for depth in range(len(curve[0]["train"])):
        name = "trunk" if depth == 0 else f"draft depth {depth}"
        (line,) = axes.plot(steps, [p["train"][depth] for p in curve], label=f"{name}, training")
        axes.plot(steps, [p["heldout"][depth] for p in curve], "--", color=line.get_color(), label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="cross entropy, nats a token")
    axes.set_ylim(top=min(max(curve[0]["train"]), curve[-1]["train"][-1] * 2))
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
