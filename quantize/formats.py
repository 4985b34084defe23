"""The two formats: under which names, and where in them, the parts of a quantized weight are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from step_kernels.model.checkpoint import DTYPES

from .layout import FP8, NVFP4

MODELOPT, COMPRESSED = FORMATS = ("modelopt", "compressed-tensors")
CODES, BLOCK_SCALES, GLOBAL_SCALE, INPUT_SCALE = range(4)  # the parts
_NAMES = {
    MODELOPT: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    COMPRESSED: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


@dataclass(frozen=True)
class Stored:
    """One weight in NVFP4 as the files have it: a linear, a stack of experts, or one expert of several.

    `weight`: its canonical name in the BF16 release; `shape` [n, k] or [experts, n, k]; `names`: of its codes, block
    scales, global and input scale; `inverse`: the last two are stored as 1 / scale.
    """

    weight: str
    shape: tuple[int, ...]
    expert: int | None
    names: tuple[str, str, str, str]
    inverse: bool

    @property
    def tensors(self) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
        """Name -> type and the shapes it may have, first the one that is written."""
        *stack, n, k = self.shape
        scalars = [tuple(stack)] if stack else [(1,), ()] if self.inverse else [(), (1,)]
        shapes = [("U8", [(*stack, n, k // 2)]), ("F8_E4M3", [(*stack, n, k // 16)]), ("F32", scalars)]
        return dict(zip(self.names, [*shapes, shapes[-1]]))

    def matrices(self) -> list[tuple[int, str]]:
        """Of each matrix its place along the stack (0 without one) and how a message names it."""
        if len(self.shape) == 3:
            return [(e, f"expert {e}") for e in range(self.shape[0])]
        return [(0, "" if self.expert is None else f"expert {self.expert}")]


@dataclass(frozen=True)
class Channels:
    """One linear in FP8 as the files have it: codes [n, k] with a scale a row, [n] or, where `column`, [n, 1].

    `weight`: its canonical name in the BF16 release; `shape` [n, k]; `names`: of its codes and scales.
    """

    weight: str
    shape: tuple[int, int]
    names: tuple[str, str]
    column: bool
    expert: None = None

    @property
    def tensors(self) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
        """Name -> type and the shapes it may have."""
        n, k = self.shape
        return dict(zip(self.names, [("F8_E4M3", [(n, k)]), ("F32", [(n, 1) if self.column else (n,)])]))

    def matrices(self) -> list[tuple[int, str]]:
        """As of `Stored`."""
        return [(0, "")]


def stored(
    weight: str, name: str, shape: tuple[int, ...], form: str, per_expert: bool, precision: str = NVFP4
) -> list[Stored] | list[Channels]:
    """How files hold a weight of the source whose name there begins as `name`, one for each tensor of codes."""
    stem, inverse = name.removesuffix(".weight"), form == COMPRESSED
    if precision == FP8:
        return [Channels(weight, shape, (f"{stem}.weight", f"{stem}.weight_scale"), form == COMPRESSED)]

    def one(stem: str, shape: tuple[int, ...], expert: int | None = None) -> Stored:
        return Stored(weight, shape, expert, tuple(f"{stem}.{part}" for part in _NAMES[form]), inverse)

    if len(shape) == 2 or not per_expert:
        return [one(stem, shape)]
    parent, _, projection = stem.rpartition(".")
    return [one(f"{parent}.experts.{e}.{projection}", shape[1:], e) for e in range(shape[0])]


def place(held: list[Stored], part: int, matrix: int) -> tuple[str, int]:
    """Where the codes, block scales or global scale of a weight's matrix go: the tensor, and from which byte of it."""
    if len(held) > 1:
        return held[matrix].names[part], 0
    name = held[0].names[part]
    dtype, shapes = held[0].tensors[name]
    return name, DTYPES[dtype].itemsize * math.prod(shapes[0]) // (held[0].shape[0] if matrix else 1) * matrix
