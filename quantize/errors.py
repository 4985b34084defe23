"""How far the quantized weights are from the source's, by layer and projection."""

from __future__ import annotations

import math


class Errors:
    """Sums of squared error and squared size of the weights, by (layer, projection)."""

    def __init__(self):
        self.sums: dict[tuple[int, str], list[float]] = {}

    def add(self, layer: int, projection: str, error: float, power: float) -> None:
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
        """A row a layer with each projection's SQNR and relative MSE, and a last row over all layers."""
        projections = list(dict.fromkeys(projection for _, projection in self.sums))
        rows = {str(n): [[(n, p)] for p in projections] for n in sorted({layer for layer, _ in self.sums})}
        rows["all"] = [[k for k in self.sums if k[1] == p] for p in projections]
        lines = ["layer" + "".join(f"{p:>22}" for p in projections) + "   (SQNR, relative MSE)"]
        for name, cells in rows.items():
            numbers = [self.relative(keys) for keys in cells]
            lines.append(f"{name:>5}" + "".join(f"   {decibel(r):7.2f} dB {r:.6f}" for r in numbers))
        return "\n".join(lines)


def decibel(relative: float) -> float:
    """SQNR in dB of a relative MSE."""
    return -10 * math.log10(relative) if relative else math.inf
