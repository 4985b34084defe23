"""How far the quantized weights are from the source's, by layer and projection."""

from __future__ import annotations

import math


class Errors:
    """Sums of squared error and squared size of the weights, by (layer, projection); lm_head is in layer None."""

    def __init__(self):
        self.sums: dict[tuple[int | None, str], list[float]] = {}

    def add(self, layer: int | None, projection: str, error: float, power: float) -> None:
        """Adds sum((quantized - weight)^2) and sum(weight^2) of some of a projection's weights."""
        sums = self.sums.setdefault((layer, projection), [0.0, 0.0])
        sums[0] += error
        sums[1] += power

    def relative(self, keys=None) -> float:
        """Relative MSE over the (layer, projection) in `keys`, or over all."""
        sums = [self.sums[k] for k in (self.sums if keys is None else keys)]
        error, power = (math.fsum(s[i] for s in sums) for i in (0, 1))
        return error / power if power else 0.0

    def table(self) -> str:
        """For each module: a row a layer with its projections' SQNR and relative MSE, and a last row over all."""
        modules: dict[str, list[str]] = {}
        for projection in dict.fromkeys(projection for _, projection in self.sums):
            modules.setdefault(projection.split(".")[0], []).append(projection)
        return "\n\n".join(self._table(projections) for projections in modules.values())

    def _table(self, projections: list[str]) -> str:
        layers = {layer for layer, projection in self.sums if projection in projections and layer is not None}
        rows = {str(n): [[(n, p)] for p in projections] for n in sorted(layers)}
        rows["all"] = [[k for k in self.sums if k[1] == p] for p in projections]
        lines = ["layer" + "".join(f"{p:>25}" for p in projections) + "   (SQNR, relative MSE)"]
        for name, cells in rows.items():
            numbers = [self.relative(keys) for keys in cells]
            lines.append(f"{name:>5}" + "".join(f"{decibel(r):13.2f} dB {r:.6f}" for r in numbers))
        return "\n".join(lines)


def decibel(relative: float) -> float:
    """SQNR in dB of a relative MSE."""
    return -10 * math.log10(relative) if relative else math.inf
