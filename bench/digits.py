"""Pictures of handwritten digits with a question and its answer: what the bundled model learns to read."""

from __future__ import annotations

import numpy as np
from PIL import Image

CELL = 48  # pixels a side of one digit: two and three are cut into a crop each, four into two crops
QUESTIONS = (
    "Which digits are in the picture?",
    "What is this?",
    "Read the number.",
    "What does the picture show?",
    "Which number is written here?",
)


def picture(images: np.ndarray, rng: np.random.Generator | None = None) -> Image.Image:
    """u8 [n, 8, 8] of 0 to 16, as scikit-learn has them -> RGB, n cells side by side, white ink on black.

    With `rng` every digit is turned, scaled and shifted a little, and ink and paper get colours of their own.
    """
    strip = Image.new("L", (CELL * len(images), CELL))
    for i, digit in enumerate(images):
        ink = Image.fromarray((digit.astype(np.uint16) * 255 // 16).astype(np.uint8))
        ink = ink.resize((CELL - 8, CELL - 8), Image.Resampling.BICUBIC)
        cell = Image.new("L", (CELL, CELL))
        cell.paste(ink, (4, 4))
        if rng is not None:
            cell = cell.transform(cell.size, Image.Transform.AFFINE, _shake(rng), Image.Resampling.BILINEAR)
        strip.paste(cell, (i * CELL, 0))
    share = np.asarray(strip, np.float32)[..., None] / 255
    paper, ink = np.zeros(3, np.float32), np.full(3, 255, np.float32)
    if rng is not None and rng.random() < 0.7:
        paper, ink = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
        if rng.random() < 0.5:
            paper, ink = ink, paper
    return Image.fromarray((paper + (ink.astype(np.float32) - paper) * share).astype(np.uint8))


def answer(labels) -> str:
    """`It is a 7.` for one digit, `The digits are 4 0 7.` for more."""
    digits = " ".join(str(int(label)) for label in labels)
    return f"It is a {digits}." if len(labels) == 1 else f"The digits are {digits}."


def _shake(rng: np.random.Generator) -> tuple[float, ...]:
    """Pillow's affine coefficients, output to input, about the cell's middle: up to 14 degrees, 15 %, 4 pixels."""
    turn = np.deg2rad(rng.uniform(-14, 14))
    wide, high = rng.uniform(0.87, 1.15, 2)
    slant = rng.uniform(-0.2, 0.2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, slant], [0, 1]])
    matrix = matrix @ np.diag([1 / wide, 1 / high])
    middle = np.full(2, CELL / 2)
    offset = middle - matrix @ (middle + rng.uniform(-4, 4, 2))
    return (*matrix[0], offset[0], *matrix[1], offset[1])
