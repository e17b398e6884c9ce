"""Masks that are dropped on the page of `afa serve`: what is a class, what is black and white, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from afa_model.data.classes import voc_palette
from afa_model.errors import DataError
from afa_model.web.mask_files import uploaded_mask

ROWS, COLUMNS = np.mgrid[:120, :160]
DISC = (ROWS - 60) ** 2 + (COLUMNS - 70) ** 2 < 40**2


def test_a_mask_of_indices_of_colours_or_of_black_and_white(tmp_path):
    label = np.zeros((8, 10), np.uint8)
    label[2:5, 3:8] = 12
    label[6, 6] = 255
    palette = Image.fromarray(label)
    palette.putpalette(voc_palette().tobytes())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(label).save(tmp_path / "grey.png")
    Image.fromarray(voc_palette()[label]).save(tmp_path / "colours.png")
    for name in ("palette", "grey", "colours"):
        assert np.array_equal(uploaded_mask(tmp_path / f"{name}.png", (8, 10)), label), name
    for value in (255 * (label == 12).astype(np.uint8), label == 12):
        Image.fromarray(value).save(tmp_path / "object.png")
        assert np.array_equal(uploaded_mask(tmp_path / "object.png", (8, 10)), label == 12)


def test_white_is_the_object_whatever_the_palette_calls_it(tmp_path):
    label = np.zeros((8, 10), np.uint8)
    label[2:5, 3:8] = 1
    black_white, white_black = [0, 0, 0, 255, 255, 255], [255, 255, 255, 0, 0, 0]
    ramp = np.arange(256, dtype=np.uint8).repeat(3).tolist()
    for name, stored, palette in (
        ("ramp", 255 * label, ramp),
        ("black first", label, black_white),
        ("white first", 1 - label, white_black),
    ):
        image = Image.fromarray(stored.astype(np.uint8))
        image.putpalette(palette)
        image.save(tmp_path / "mask.png")
        assert np.array_equal(uploaded_mask(tmp_path / "mask.png", (8, 10)), label), name
    image = Image.fromarray(3 * label)  # an index that is none of black and white's is a class
    image.putpalette([0, 0, 0] * 3 + [255, 255, 255])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(uploaded_mask(tmp_path / "mask.png", (8, 10)), 3 * label)


def test_a_mask_of_another_size_is_enlarged_if_its_shape_fits(tmp_path):
    Image.fromarray(np.array([[0, 1, 2], [3, 0, 0]], np.uint8)).save(tmp_path / "small.png")
    made = uploaded_mask(tmp_path / "small.png", (20, 31))
    assert made.shape == (20, 31) and made[0, 30] == 2 and made[19, 0] == 3 and set(np.unique(made)) == {0, 1, 2, 3}
    with pytest.raises(DataError, match=r"small.png: 3 × 2 pixels .* 20 × 31; is one of them turned"):
        uploaded_mask(tmp_path / "small.png", (31, 20))


def shades(kind: str) -> Image.Image:
    """A disc of white on black, with shades of grey between them."""
    hard = Image.fromarray((255 * DISC).astype(np.uint8))
    soft = hard.filter(ImageFilter.GaussianBlur(1.5))
    levels = np.asarray(soft)
    noise = np.random.default_rng(0).integers(0, 20, levels.shape)
    if kind == "noise":
        return Image.fromarray(np.where(DISC, 255 - noise, noise).astype(np.uint8))
    if kind == "dim":  # no level is 128 or more: too many for classes they are all the same
        return Image.fromarray(np.where(DISC, 60 + 2 * noise, noise).astype(np.uint8))
    if kind == "two greys":
        return Image.fromarray(np.where(DISC, 200, 40).astype(np.uint8))
    if kind == "16 bits":
        return Image.fromarray(levels.astype(np.uint16) * 257)
    if kind == "palette":
        image = Image.fromarray((levels // 16).astype(np.uint8))
        image.putpalette((np.arange(16, dtype=np.uint8) * 17).repeat(3).tolist())
        return image
    return soft.convert("RGB") if kind == "rgb" else soft


@pytest.mark.parametrize(
    "kind", ["soft.png", "rgb.png", "noise.png", "dim.png", "two greys.png", "16 bits.png", "palette.png", "soft.jpg"]
)
def test_shades_of_black_and_white_are_one_object(tmp_path, kind):
    shades(kind.split(".")[0]).save(tmp_path / kind)
    made = uploaded_mask(tmp_path / kind, DISC.shape)
    assert set(np.unique(made)) == {0, 1}
    assert (made != DISC).mean() < 0.005  # but for the pixels along its edge


def test_a_jpeg_that_is_grey_but_for_its_noise_is_black_and_white(tmp_path):
    pixels = np.repeat(255 * DISC[..., None], 3, 2).astype(int)
    tint = np.random.default_rng(0).integers(-8, 9, pixels.shape)
    Image.fromarray((pixels + tint).clip(0, 255).astype(np.uint8)).save(tmp_path / "mask.jpg", quality=95)
    assert (uploaded_mask(tmp_path / "mask.jpg", DISC.shape) != DISC).mean() < 0.005


@pytest.mark.parametrize("kind", ["ramp", "photograph", "four greys", "too many", "one too high"])
def test_greys_without_two_clusters_are_refused(tmp_path, kind):
    levels = {
        "ramp": COLUMNS * 255 // 159,
        "photograph": np.random.default_rng(0).normal(120, 50, DISC.shape).clip(0, 255),
        "four greys": COLUMNS // 40 * 85,
        "too many": COLUMNS * 33 // 160,
        "one too high": np.where(COLUMNS < 40, 128, COLUMNS // 40 * 20),
    }[kind]
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"^mask.png: .*too many shades of grey .* white on the object and black"):
        uploaded_mask(tmp_path / "mask.png", DISC.shape)


def test_as_many_class_numbers_as_anybody_has_are_classes(tmp_path):
    label = (COLUMNS * 32 // 160).astype(np.uint8)
    label[label == 31] = 127
    Image.fromarray(label).save(tmp_path / "mask.png")
    assert np.array_equal(uploaded_mask(tmp_path / "mask.png", DISC.shape), label)


def test_a_file_that_is_no_mask_is_refused_in_words_of_the_page(tmp_path):
    photo = np.stack([ROWS * 2, COLUMNS, (ROWS + COLUMNS) % 256], -1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "print.tif")
    clear = Image.fromarray(photo)
    clear.putalpha(Image.fromarray((200 * DISC).astype(np.uint8)))
    clear.save(tmp_path / "clear.png")
    odd = Image.fromarray(DISC.astype(np.uint8))
    odd.putpalette([9, 9, 9, 0, 128, 0])
    odd.save(tmp_path / "odd.png")
    why = dict.fromkeys(("photo.png", "print.tif", "odd.png"), "neither black and white nor VOC's")
    why |= {"photo.jpg": "JPEG", "clear.png": "transparent"}
    for name, said in why.items():
        with pytest.raises(DataError, match=f"^{name}: .*{said}.* Drop one that is white on the object") as error:
            uploaded_mask(tmp_path / name, DISC.shape)
        assert not any(word in str(error.value) for word in ("data.", "mode", str(tmp_path)))
    (tmp_path / "words.png").write_text("no mask")
    with pytest.raises(DataError, match=r"^words.png: .*it is a text"):
        uploaded_mask(tmp_path / "words.png", DISC.shape)
