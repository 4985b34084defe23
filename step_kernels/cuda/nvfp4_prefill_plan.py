"""Which of the prefill kernels, in which tiles, for so many tokens: from clocks that are tabled here."""

from __future__ import annotations

import functools

# Tile sizes (tokens) of each kernel, ascending, multiples of 8.
SIZES = {
    "halves_32": (8, 16, 24, 32), "halves_48": (24, 32, 40, 48),
    "few_64": (32, 64), "few_96": (64, 96), "few_128": (128,),
    "many": tuple(range(32, 257, 16)),
}  # fmt: skip
BLOCKS = 4  # of 64 rows: the CTA of a few_ or halves_ kernel, or a cluster of two CTAs
STEP, HALVES_STEP = 2, 4  # chunks of 64 k that a few_ or a halves_ kernel takes at a time

# Measured on an H200, clocks of 1.755 GHz for 256 rows x 64 k by tile size: of an SM, in _CLOCKS of a cluster of two.
_FEW_CLOCKS = {32: 960, 64: 1120, 96: 1270, 128: 1420}
_CLOCKS = {32: 720, 64: 770, 96: 850, 128: 950, 160: 1000, 224: 1150, 256: 1240}
_HALVES_CLOCKS = {8: 623, 16: 670, 24: 772, 32: 881, 40: 984, 48: 1088}
_TILE_CLOCKS = 3400  # of a tile's first copies and its output
# Of the kernel that adds the splits: its start, each split's way through memory, and its bytes a clock.
_SUM_CLOCKS, _SPLIT_CLOCKS, _SUM_BYTES = 4000, 300, 1200


@functools.lru_cache(1024)
def dense_plan(tokens: int, blocks: int, chunks: int, multiprocessors: int) -> tuple[str, int, int]:
    """Kernel, tokens a tile and splits of k for the shortest way through all tiles.

    Not halves_: with one weight few_ is ahead wherever both were measured, 8192 x 4096 at 16 tokens 15.7 us to 18.5.
    """
    row_tiles, steps = -(-blocks // BLOCKS), -(-chunks // STEP)
    plans = []
    for size in _CLOCKS:
        tiles = -(-tokens // size) * row_tiles
        clocks = -(-tiles // (multiprocessors // 2)) * (chunks * _CLOCKS[size] + _TILE_CLOCKS)
        plans.append((clocks, "many", size, 1))
    for size in _FEW_CLOCKS:
        tiles = -(-tokens // size) * row_tiles
        name = next(name for name, sizes in SIZES.items() if size in sizes and name.startswith("few_"))
        for each in {-(-steps // splits) for splits in range(1, 33)}:
            splits = -(-steps // each)
            clocks = -(-tiles * splits // multiprocessors) * (each * STEP * _FEW_CLOCKS[size] + _TILE_CLOCKS)
            if splits > 1:
                partial = tiles * splits * size * BLOCKS * 64 * 4
                clocks += _SUM_CLOCKS + splits * _SPLIT_CLOCKS + partial // _SUM_BYTES
            plans.append((clocks, name, size, splits))
    return min(plans)[1:]


def _many_clocks(size: int) -> float:
    """_CLOCKS, on a line between the sizes that were measured."""
    below, above = max(s for s in _CLOCKS if s <= size), min(s for s in _CLOCKS if s >= size)
    return _CLOCKS[below] + (_CLOCKS[above] - _CLOCKS[below]) * (size - below) / max(1, above - below)


def moe_kernel(mean: float) -> str:
    """The kernel that is best where experts have `mean` tokens, give or take its square root."""

    def clocks(name: str) -> float:
        total, largest = 0, SIZES[name][-1]
        table = {"f": _FEW_CLOCKS, "h": _HALVES_CLOCKS}.get(name[0])
        for tokens in (mean + deviations * mean**0.5 for deviations in (-1.5, -0.5, 0.5, 1.5)):
            count = max(1, -(-tokens // largest))
            size = next(s for s in SIZES[name] if s * count >= tokens)
            total += count * (table[size] + 80 if table else 2 * (_many_clocks(size) + 80))
        return total

    return min(SIZES, key=clocks)


def bounds(pairs: int, experts: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """The most tiles and rows of sorted x that any routing of `pairs` can need in a kernel of these tile sizes."""
    tiles = pairs // sizes[-1] + min(experts, pairs)
    return tiles, pairs + tiles * max(b - a for a, b in zip((0, *sizes), sizes))
