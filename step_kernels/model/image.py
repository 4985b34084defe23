"""An image to what the model reads: a global view, local crops, and the tokens that hold their places.

The planning rules and their order are the serving engines': shrink and stretch the 8-bit picture, cut, then normalise
and resize each view in float. Padding is black pixels, added before normalising.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .config import VisionConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PATCH, PATCH_START, PATCH_END, PATCH_NEWLINE = "<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
TOKENS = (PATCH, PATCH_START, PATCH_END, PATCH_NEWLINE, IMAGE_START, IMAGE_END)


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, what it is and what was wanted."""


@dataclass(frozen=True)
class CropPlan:
    """How an image is cut, in pixels. `padded`: to a square first; (`width`, `height`): shrunk to this; then stretched
    to `canvas` (width, height) and cut into `columns` x `rows` windows. No crops: window, columns and rows are 0."""

    padded: bool
    width: int
    height: int
    window: int
    canvas: tuple[int, int]
    columns: int
    rows: int


@dataclass(frozen=True)
class Views:
    """One image's normalised pixels: f32 [3, image_size, image_size] and f32 [columns * rows, 3, crop_size, crop_size],
    row-major."""

    global_view: Tensor
    crops: Tensor
    columns: int
    rows: int


def crop_plan(width: int, height: int, config: VisionConfig, name: str = "image") -> CropPlan:
    """The plan for an image of width x height pixels; ImageError, with `name`, where a side is 0 or shrinks to 0."""
    if min(width, height) < 1:
        raise ImageError(f"{name}: got {width} x {height} pixels, wanted at least 1 x 1")
    padded = min(width, height) < 32 and max(width, height) > 4 * min(width, height)
    wide, high = (max(width, height),) * 2 if padded else (width, height)
    limit = 6 * config.crop_size  # 3024
    if max(wide, high) > limit:
        scale = limit / max(wide, high)
        wide, high = int(wide * scale), int(high * scale)
        if min(wide, high) < 1:
            raise ImageError(f"{name}: got {width} x {height} pixels, too thin for a longest side of {limit}")
    long, short = max(wide, high), min(wide, high)
    if long <= config.image_size:
        window = short if long / short > 1.5 else 0
    else:
        window = min(short, config.crop_size) if long / short > 4 else config.crop_size
    if window == 0:
        return CropPlan(padded, wide, high, 0, (wide, high), 0, 0)
    columns, rows = _windows(wide, window), _windows(high, window)
    canvas = (columns * window if wide >= window else wide, rows * window if high >= window else high)
    return CropPlan(padded, wide, high, window, canvas, columns, rows)


def _windows(length: int, window: int) -> int:
    """How many windows a side gets: a fifth of one left over earns another."""
    if length < window:
        return 1
    # In float as the engines do, which at an exact fifth rounds either way: 2.2 - 2 > 0.2, but 1.2 - 1 < 0.2.
    return length // window + (length / window - length // window > 0.2)


def token_count(columns: int, rows: int, config: VisionConfig) -> int:
    """Tokens that an image with this crop grid takes in the prompt."""
    return columns * rows * (config.crop_tokens + 2) + max(rows - 1, 0) + config.image_tokens + 2


def image_tokens(columns: int, rows: int, config: VisionConfig, ids: Mapping[str, int]) -> list[int]:
    """The token ids that stand for an image: its crops row by row, then the global view; `ids` maps token texts to ids.
    ValueError where one is missing."""
    missing = [name for name in TOKENS if ids.get(name) is None]
    if missing:
        raise ValueError(f"ids: got none for {', '.join(missing)}, wanted one for each of {', '.join(TOKENS)}")
    tokens = []
    for row in range(rows):
        if row:
            tokens.append(ids[PATCH_NEWLINE])
        tokens += ([ids[PATCH_START]] + [ids[PATCH]] * config.crop_tokens + [ids[PATCH_END]]) * columns
    return tokens + [ids[IMAGE_START]] + [ids[PATCH]] * config.image_tokens + [ids[IMAGE_END]]


def read_rgb(source: str | os.PathLike | Image.Image) -> Image.Image:
    """The image upright in RGB, transparent parts over white, 16-bit grey scaled to 8; ImageError naming the file."""
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _rgb(source)
        with open(source, "rb") as file, Image.open(file) as image:
            return _rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: not found") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: got {os.path.getsize(source)} bytes that are no image Pillow knows") from None
    except Exception as e:  # the decoders raise a dozen types on damaged bytes
        reason = e.strerror if isinstance(e, OSError) else None
        reason = reason or " ".join(str(e).split()) or type(e).__name__
        raise ImageError(f"{name}: not readable as an image: {reason}") from None


def _name(source: str | os.PathLike | Image.Image) -> str:
    return "image" if isinstance(source, Image.Image) else os.fspath(source)


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        image = Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(source: str | os.PathLike | Image.Image, config: VisionConfig) -> Views:
    """The views of an image or image file; ImageError where it is none."""
    image = read_rgb(source)
    plan = crop_plan(*image.size, config, _name(source))
    if plan.padded:
        side = max(image.size)
        image = image.crop((0, 0, side, side))
    image = image.resize((plan.width, plan.height), Image.Resampling.BILINEAR)
    canvas = image.resize(plan.canvas, Image.Resampling.BILINEAR)
    crops = torch.empty(plan.columns * plan.rows, 3, config.crop_size, config.crop_size)
    for i in range(len(crops)):
        top, left = (n * plan.window for n in divmod(i, plan.columns))
        # Past the canvas's edge Pillow's crop gives black, the padding wanted where a side is shorter than the window.
        crops[i] = _view(canvas.crop((left, top, left + plan.window, top + plan.window)), config.crop_size)
    return Views(_view(image, config.image_size), crops, plan.columns, plan.rows)


def _view(image: Image.Image, size: int) -> Tensor:
    """f32 [3, size, size]: normalised, then resized with antialiasing."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return F.interpolate(pixels[None], (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
