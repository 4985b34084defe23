"""The report's sections that are plots: what they show, and a sentence that says how to read them, as HTML."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import plots
from .figures import Figures, Weight, layer_order
from .layout import FP8, NVFP4, layer_number, projection_name
from .tables import table

FEW_TOKENS = 256  # an expert calibrated on fewer is told apart


def experts(figures: Figures) -> str:
    """SQNR of every expert."""
    stacks = {key: weight for key, weight in figures.weights.items() if len(weight.scales) > 1}
    layers = sorted({layer for layer, _ in stacks}, key=layer_order)
    width = max((len(weight.scales) for weight in stacks.values()), default=0)
    panels = {p: np.full((len(layers), width), np.nan) for p in dict.fromkeys(p for _, p in stacks)}
    for (layer, projection), weight in stacks.items():
        panels[projection][layers.index(layer), : len(weight.scales)] = weight.sqnr
    values = _finite(np.concatenate([panel.ravel() for panel in panels.values()])) if panels else np.empty(0)
    if not len(values):
        return ""
    middle = np.median(values)
    # Six times what holds half of all around the median (of Gaussian numbers one in 40,000 lies below), or 0.5 dB.
    reach = max(0.5, 6 * np.median(np.abs(values - middle)))
    low, high = middle - reach, max(min(values.max(), middle + reach), middle + 0.1)
    below = int((values < low).sum())
    return (
        "<h2>Error by layer and expert</h2><p>One cell an expert, the brighter the better; orange are those below "
        f"{low:.2f} dB, far from the median of {middle:.2f}: {below:,} of {len(values):,}. Gray: all zero.</p>"
        + plots.heat_maps(panels, layers, low, high, "SQNR, dB", log=False)
    )


def scales(figures: Figures) -> str:
    """Block scales and the matrices' scales."""
    totals: dict[str, Weight] = {}
    noted: dict[str, list[np.ndarray]] = {}
    for (_, projection), weight in figures.weights.items():
        if not weight.counts.any():  # FP8 has no blocks
            continue
        totals.setdefault(projection, Weight.zeros(0)).counts += weight.counts
        noted.setdefault(projection, []).append(weight.scales[weight.scales > 0])
    sampled, weights = sum(t.sampled for t in totals.values()), 16 * sum(int(t.codes.sum()) for t in totals.values())
    if not weights:
        return ""
    rows = []
    for projection, total in totals.items():
        blocks, values = int(total.codes.sum()), np.concatenate(noted[projection])
        of_blocks = (total.zero_blocks, int(total.codes[126]), int(total.codes[1 : plots.SUBNORMAL].sum()))
        row = [projection, f"{blocks:,}", *(_percent(n, blocks) for n in of_blocks)]
        row += [_percent(n, total.sampled) for n in total.above]
        rows.append([*row, *(f"{f(values):.2e}" if len(values) else "–" for f in (np.min, np.median, np.max))])
    head = ["projection", "blocks", "zero, %", "at 448, %", "subnormal, %", "above 6, %", "above 7, %"]
    head += [f"matrix scale, {which}" for which in ("least", "median", "largest")]
    part = "" if sampled == weights else f" Counted in {100 * sampled / weights:.1f} % of the rows."
    spread = {p: _by_layer(figures, p, lambda weight: weight.scales[weight.scales > 0]) for p in totals}
    return (
        "<h2>Scales</h2><p>Shares of blocks whose codes are all 0, whose scale is the largest of e4m3, or so small "
        "that it has fewer bits. Shares of weights that are more than 6 times their block's scale, beyond the largest "
        f"value of a code, or more than 7 times, where clipping errs more than rounding can.{part}</p>"
        + table(head, rows, "lrrrrrrrrr")
        + "<h3>Block scales</h3><p>How often each of the 126 scale codes was chosen, on a logarithmic axis; many in "
        "the shaded subnormal range mean that the weights of a matrix differ too much in size.</p>"
        + plots.scale_codes(_modules({p: t.codes for p, t in totals.items()}))
        + "<h3>Offsets chosen by the search</h3><p>How many codes the block scale lies above that of amax / 6, which "
        f"<code>max</code> takes; below 0 the largest weights of the block are clipped.{part}</p>"
        + plots.offsets(_modules({p: t.offsets for p, t in totals.items()}))
        + _ranges(
            "<h3>Matrix scales</h3><p>weight_scale_2 by layer: a line for the median of the experts, a band from the "
            "least to the largest; a matrix far above its neighbours has an outlier.</p>",
            spread,
            "weight_scale_2",
            log=True,
        )
    )


def calibration(figures: Figures) -> str:
    """Tokens that each expert was calibrated on, and by how much the outputs then err."""
    text, tokens = "", {}
    for (layer, _), weight in figures.weights.items():
        if len(weight.scales) > 1 and weight.tokens.any():
            tokens.setdefault(layer, weight.tokens)
    if tokens:
        layers = sorted(tokens)
        counts = np.stack([tokens[layer] for layer in layers])
        few, none = int((counts < FEW_TOKENS).sum()), int((counts == 0).sum())
        high = max(float(counts.max()), 2 * FEW_TOKENS)
        text = (
            "<h2>Tokens that each expert was calibrated on</h2><p>The brighter the more, on a logarithmic scale; "
            f"orange are those of fewer than {FEW_TOKENS} tokens: {few:,} of {counts.size:,}, of which {none:,} saw "
            f"none. The median is {np.median(counts):,.0f} tokens.</p>"
            + plots.heat_maps({"routed tokens": counts.clip(0.5)}, layers, FEW_TOKENS, high, "tokens", log=True)
        )
    outputs = {p: _by_layer(figures, p, lambda weight: _finite(weight.output_sqnr)) for _, p in figures.weights}
    return text + _ranges(
        "<h2>Error of the outputs</h2><p>SQNR of the products with the calibration's own inputs by layer: a line for "
        "the median of the experts, a band from the least to the largest; this the calibrated searches raise.</p>",
        outputs,
        "output SQNR, dB",
    )


def precisions(figures: Figures) -> str:
    """What the mixed recipe measured and chose."""
    chosen, damages, rows = figures.precisions, figures.damages, {}
    sums = [0.0, 0.0, 0.0]
    for leader, damage in damages.items():
        layer, ends = layer_number(leader), (damage[FP8], damage[chosen[leader]], damage[NVFP4])
        sums = [total + end for total, end in zip(sums, ends)]
        if layer is not None and ends[-1]:  # lm_head is only in the sums
            rows.setdefault(projection_name(leader), []).append((layer, *(end or np.nan for end in ends)))
    return _ranges(
        "<h2>Precisions by what they change</h2><p>How much the hidden states behind a layer change, "
        "|change|² / |hidden|², when one group of its linears is quantized (q_proj stands for q, k and v, gate_proj "
        "for gate and up): a band from FP8 to NVFP4, a line for what was chosen, broken where a group stays as it was. "
        "Added up over all groups: in FP8 {:.2e}, as chosen {:.2e}, in NVFP4 {:.2e}.</p>".format(*sums),
        {projection: np.array(of) for projection, of in rows.items()},
        "change",
        log=True,
    )


def _ranges(heading: str, projections: dict[str, np.ndarray], label: str, log: bool = False) -> str:
    projections = {projection: rows for projection, rows in projections.items() if len(rows)}
    return heading + plots.by_layer(_modules(projections), label, log) if projections else ""


def _by_layer(figures: Figures, projection: str, values: Callable[[Weight], np.ndarray]) -> np.ndarray:
    """[layers, 4]: layer, least, median, largest of values(weight); lm_head has no layer and is not among them."""
    mine = {n: values(weight) for (n, p), weight in figures.weights.items() if p == projection and n is not None}
    rows = [(layer, v.min(), np.median(v), v.max()) for layer, v in sorted(mine.items()) if len(v)]
    return np.array(rows).reshape(-1, 4)


def _modules(projections: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """By module what was by projection, and projections with equal numbers as one."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, values in projections.items():
        module, _, short = name.rpartition(".")
        alike = modules.setdefault(module or name, {})
        same = next((n for n, other in alike.items() if np.array_equal(other, values)), None)
        if same is None:
            alike[short] = values
        else:
            modules[module or name] = {f"{n}, {short}" if n == same else n: other for n, other in alike.items()}
    return modules


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _percent(count: int, of: int) -> str:
    share = 100 * count / of if of else 0
    return "0" if not share else "< 0.0001" if share < 1e-4 else f"{share:.4f}"
