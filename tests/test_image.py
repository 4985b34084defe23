import numpy as np
import pytest
import torch
from PIL import Image

from step_kernels.model.config import VisionConfig
from step_kernels.model.image import TOKENS, ImageError, crop_plan, image_tokens, prepare, read_rgb, token_count


def vision_config(image_size, crop_size):
    return VisionConfig(
        image_size=image_size,
        crop_size=crop_size,
        patch_size=14,
        width=1536,
        layers=47,
        heads=16,
        mlp_width=8960,
        image_tokens=(image_size // 56) ** 2,
        crop_tokens=(crop_size // 56) ** 2,
    )


# CLIP's statistics
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FULL = vision_config(728, 504)
MINI = vision_config(168, 112)  # longest side 672
IDS = {name: 100 + i for i, name in enumerate(TOKENS)}


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "width, height, patches, newlines, tokens",
    [
        (1000, 1000, 4, 1, 504),
        (1280, 720, 6, 1, 670),
        (1920, 1080, 8, 1, 836),
        (4000, 3000, 30, 4, 2665),
        (1000, 300, 2, 0, 337),
        (600, 300, 2, 0, 337),
        (3000, 600, 6, 0, 669),
        (5000, 400, 13, 0, 1250),
        (100, 20, 0, 0, 171),
    ],
)
def test_published_sizes_give_the_published_patches_newlines_and_tokens(width, height, patches, newlines, tokens):
    plan = crop_plan(width, height, FULL)
    ids = image_tokens(plan.columns, plan.rows, FULL, IDS)
    assert plan.columns * plan.rows == patches == ids.count(IDS["<patch_start>"]) == ids.count(IDS["<patch_end>"])
    assert ids.count(IDS["<patch_newline>"]) == newlines
    assert ids.count(IDS["<im_patch>"]) == 81 * patches + 169
    assert len(ids) == tokens == token_count(plan.columns, plan.rows, FULL)


def test_a_728_pixel_square_is_not_cropped_and_a_729_pixel_one_is():
    assert crop_plan(728, 728, FULL).window == 0 and crop_plan(729, 728, FULL).window == 504


def test_windows_follow_the_short_side_of_long_thin_images():
    assert crop_plan(600, 400, FULL).window == 0  # 1.5 is not above 1.5
    assert crop_plan(601, 400, FULL).window == 400
    assert crop_plan(1600, 400, FULL).window == 504  # 4 is not above 4
    assert crop_plan(400, 1601, FULL).window == 400
    assert crop_plan(3000, 600, FULL).window == 504


def test_an_exact_fifth_of_a_window_rounds_as_float_division_does():
    assert 220 / 100 - 2 > 0.2 > 656 / 80 - 8
    assert crop_plan(220, 100, FULL).columns == 3 and crop_plan(656, 80, FULL).columns == 8


def test_sides_shrink_to_six_windows_and_round_down():
    plan = crop_plan(4001, 3001, FULL)
    assert (plan.width, plan.height) == (3024, 2268)  # 3001 * 3024 / 4001 = 2268.19
    assert (crop_plan(800, 250, MINI).width, crop_plan(800, 250, MINI).height) == (672, 210)


def test_only_images_thinner_than_32_pixels_and_a_quarter_are_padded_to_a_square():
    assert crop_plan(100, 20, FULL).padded and crop_plan(20, 100, FULL).padded
    assert not crop_plan(80, 20, FULL).padded and not crop_plan(200, 32, FULL).padded
    assert (crop_plan(100, 20, FULL).width, crop_plan(100, 20, FULL).height) == (100, 100)


def test_patches_come_row_by_row_with_newlines_between_and_the_whole_view_last():
    config = vision_config(112, 56)  # 4 tokens a whole view, 1 a crop
    patch, start, end, newline, image_start, image_end = (IDS[name] for name in TOKENS)
    crop = [start, patch, end]
    assert image_tokens(2, 2, config, IDS) == (
        crop + crop + [newline] + crop + crop + [image_start] + 4 * [patch] + [image_end]
    )
    assert image_tokens(0, 0, config, IDS) == [image_start] + 4 * [patch] + [image_end]


def test_a_missing_token_id_is_named():
    with pytest.raises(ValueError, match="^ids: got none for <patch_newline>, wanted"):
        image_tokens(1, 1, FULL, {k: v for k, v in IDS.items() if k != "<patch_newline>"})


def naive_resize(pixels, width, height, rounded=False):
    """[h, w, c] resized in float64: a triangle as wide as the larger of the two pixels, along rows and then columns;
    `rounded` to integers after each, as Pillow does on 8-bit pixels."""
    for axis, size in ((1, width), (0, height)):
        ratio = pixels.shape[axis] / size
        centre = (np.arange(size) + 0.5) * ratio
        distance = np.abs(np.arange(pixels.shape[axis]) + 0.5 - centre[:, None]) / max(ratio, 1)
        filters = np.maximum(1 - distance, 0)
        filters /= filters.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(filters, pixels, (1, axis)), 0, axis)
        pixels = np.floor(pixels + 0.5) if rounded else pixels
    return pixels


def naive_view(pixels, size):
    """Channels first, of 0..255 pixels."""
    return naive_resize((pixels / 255 - MEAN) / STD, size, size).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(100, 90), (168, 168), (37, 50)])
def test_the_whole_view_is_the_normalised_image_resized_in_float(size):
    image = noise(*size)
    views = prepare(image, MINI)
    assert views.crops.shape == (0, 3, 112, 112) and (views.columns, views.rows) == (0, 0)
    assert views.global_view.dtype == torch.float32
    np.testing.assert_allclose(views.global_view, naive_view(np.asarray(image), 168), atol=1e-4)


@pytest.mark.parametrize(
    "size, shrunk, window, columns, rows, canvas",
    [
        ((300, 200), (300, 200), 112, 3, 2, (336, 224)),
        ((160, 60), (160, 60), 60, 3, 1, (180, 60)),
        ((90, 400), (90, 400), 90, 1, 5, (90, 450)),
        ((800, 250), (672, 210), 112, 6, 2, (672, 224)),
        ((250, 80), (250, 80), 112, 3, 1, (336, 80)),
    ],
)
def test_crops_are_cut_from_the_stretched_image_and_padded_with_black(size, shrunk, window, columns, rows, canvas):
    image = noise(*size)
    views = prepare(image, MINI)
    assert (views.columns, views.rows, views.crops.shape) == (columns, rows, (columns * rows, 3, 112, 112))
    whole = naive_resize(np.asarray(image), *shrunk, rounded=True)
    stretched = naive_resize(whole, *canvas, rounded=True)
    padded = np.zeros((rows * window, columns * window, 3))
    padded[: canvas[1], : canvas[0]] = stretched
    crops = [padded[r * window :, c * window :][:window, :window] for r in range(rows) for c in range(columns)]
    for got, pixels in zip([views.global_view, *views.crops], [whole, *crops]):
        difference = np.abs(got.numpy() - naive_view(pixels, got.shape[-1]))
        # Pillow's filters are fixed-point: a rare pixel falls one level of 255 (0.015 normalised) off.
        assert difference.max() < 0.03 and difference.mean() < 1e-3


def test_a_sliver_is_padded_below_with_black():
    whole = prepare(Image.new("RGB", (168, 21), "white"), MINI).global_view
    assert torch.allclose(whole[:, :20], ((1 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None], atol=1e-5)
    assert torch.allclose(whole[:, 22:], (-torch.tensor(MEAN) / torch.tensor(STD))[:, None, None], atol=1e-5)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 257, 60000, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.asarray(read_rgb(tmp_path / "grey.png")).tolist() == [[[v] * 3 for v in (0, 1, 233, 255)]]


def test_transparency_shows_white():
    assert read_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert read_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 1
    assert read_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode, colour, rgb",
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LA", (9, 255), (9, 9, 9)),
    ],
)
def test_other_colour_modes_become_rgb(mode, colour, rgb):
    assert read_rgb(Image.new(mode, (2, 1), colour)).getpixel((1, 0)) == rgb


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read_rgb(tmp_path / "turned.png")
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (255, 0, 0)


def damaged(folder, kind):
    """A path that is no usable image, in the way of its name."""
    path = folder / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.touch()
    elif kind != "missing":
        noise(64, 64).save(path, "PNG" if kind == "png" else "JPEG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("missing", "not found"),
        ("folder", "not readable as an image: Is a directory"),
        ("empty", "got 0 bytes that are no image"),
        ("text", "got 18 bytes that are no image"),
        ("png", "not readable as an image: .*truncated"),
        ("jpeg", "not readable as an image: .*truncated"),
    ],
)
def test_an_unusable_file_is_named_in_one_line_with_the_reason(tmp_path, kind, reason):
    path = damaged(tmp_path, kind)
    with pytest.raises(ImageError, match=f"^{path}: {reason}") as error:
        prepare(path, MINI)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="bomb.png: .*exceeds limit of 2000 pixels"):
        prepare(tmp_path / "bomb.png", MINI)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="^image: got 0 x 5 pixels, wanted at least 1 x 1"):
        prepare(Image.new("RGB", (0, 5)), MINI)


def test_an_image_that_would_shrink_to_nothing_is_refused():
    with pytest.raises(ImageError, match="^wire.png: got 100000 x 32 pixels, too thin for a longest side of 3024"):
        crop_plan(100000, 32, FULL, "wire.png")
