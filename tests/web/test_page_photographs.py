"""Photographs as the page of `afa serve` takes them, of any kind, and what it refuses; masks as they are painted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from afa_model.errors import DataError
from afa_model.web.masks import NOTHING, Stroke, brush_colors, mask_of, painted, strokes_of
from afa_model.web.photographs import (
    coarse,
    examples_in,
    examples_of,
    generated_examples,
    masked_examples,
    photograph,
)
from afa_model.web.settings import ServeSettings


def picture(height: int = 37, width: int = 53) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 4 % 256, columns * 3 % 256, (rows + columns) % 256], -1).astype(np.uint8)


# --- photographs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "grey", "alpha", "grey16", "palette", "turned"])
def test_any_photograph_is_8_bits_of_rgb(tmp_path, kind):
    pixels, path = picture(), tmp_path / "photo.png"
    image, want = Image.fromarray(pixels), pixels
    if kind == "grey":
        image = image.convert("L")
        want = np.repeat(np.asarray(image)[..., None], 3, 2)
    elif kind == "alpha":
        image.putalpha(Image.fromarray(np.where(np.arange(53) < 20, 0, 255)[None].repeat(37, 0).astype(np.uint8)))
        want = np.where((np.arange(53) < 20)[None, :, None], 255, pixels)
    elif kind == "grey16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        want = np.repeat(pixels[..., :1], 3, 2)
    elif kind == "palette":
        image = image.convert("P")
        want = np.asarray(image.convert("RGB"))
    if kind == "turned":
        exif = Image.Exif()
        exif[274] = 6  # to be turned clockwise
        path = tmp_path / "photo.webp"
        image.save(path, lossless=True, exif=exif)
        want = np.rot90(pixels, -1)
    else:
        image.save(path)
    made = photograph(path)
    assert made.pixels.dtype == np.uint8 and np.array_equal(made.pixels, want)
    assert made.size == made.stored == want.shape[:2] and made.name == path.name


def test_exif_may_be_left_alone(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert photograph(tmp_path / "a.png", ServeSettings(exif="ignore")).size == (37, 53)


def test_a_large_photograph_is_made_smaller_and_that_is_said(tmp_path):
    Image.fromarray(picture(301, 150)).save(tmp_path / "large.png")
    made = photograph(tmp_path / "large.png", ServeSettings(long_side=100))
    assert made.size == (100, 50) and made.stored == (301, 150)
    assert made.said == "large.png: 150 × 301 pixels, worked on at 50 × 100"
    assert photograph(tmp_path / "large.png", ServeSettings(long_side=301)).said == "large.png: 150 × 301 pixels"


def broken(path, kind: str):
    """A file that is no photograph, by its ending or at all."""
    Image.fromarray(picture(200, 200)).save(path, "JPEG")
    whole = path.read_bytes()
    content = {"text": b"these are words\n" * 20, "cut": whole[: len(whole) // 3], "empty": b""}
    path.write_bytes(content.get(kind, whole))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("text", {}, "it is a text"),
        ("cut", {}, "cannot be decoded"),
        ("empty", {}, "the file is empty"),
        ("enormous", {"max_pixels": 39_999}, "200x200 pixels, more than the limit max_pixels = 39999"),
        ("heavy", {"max_megabytes": 1e-4}, "more than the 0.0001 MB taken here"),
    ],
)
def test_a_file_that_is_no_photograph_is_refused_by_its_name_alone(tmp_path, kind, settings, said):
    broken(tmp_path / "holiday.jpg", kind)
    with pytest.raises(DataError) as error:
        photograph(tmp_path / "holiday.jpg", ServeSettings(**settings))
    assert str(error.value).startswith("holiday.jpg: ") and said in str(error.value)
    assert str(tmp_path) not in str(error.value)  # where uploads are kept is nobody's business


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(DataError, match=path.name):
            photograph(path)


def test_settings_check_themselves():
    wrong = {"port": 70000, "host": "", "long_side": 8, "max_megabytes": 0, "max_pixels": 0, "exif": "maybe"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ServeSettings(**{name: value})
    assert ServeSettings().host == "127.0.0.1"


# --- examples ---------------------------------------------------------------------------------------------------------


def test_examples_are_the_first_photographs_that_can_be_read(tmp_path):
    for name in "hgfedcba":
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_text("no photograph")
    (tmp_path / "notes.txt").write_text("no photograph either")
    found = examples_in(tmp_path)
    assert [each.name for each in found] == ["a.png", "c.png", "d.png", "e.png", "f.png", "g.png"]
    assert found[1].read().name == "c.png" and found[1].read().size == (37, 53)
    assert examples_of([tmp_path / "b.png"]) == []


def test_a_folder_without_examples_is_told(tmp_path):
    with pytest.raises(DataError, match="examples: no photograph in"):
        examples_in(tmp_path)
    with pytest.raises(DataError, match=r"examples: .*nowhere is not a folder"):
        examples_in(tmp_path / "nowhere")


def test_there_are_generated_examples_with_masks_and_without():
    assert len({each.read().pixels.tobytes() for each in generated_examples(3)}) == 3
    for each in masked_examples():
        made = each.read()
        assert made.label.shape == made.size and made.label.dtype == np.uint8
        assert 0 in made.label and made.label.max() > 0  # a background and something


def test_a_coarse_mask_is_constant_in_its_cells():
    mask = np.zeros((20, 31), np.uint8)
    mask[3:9, 4:14] = 2
    mask[3, 4] = 5
    made = coarse(mask, 8)
    assert made.shape == mask.shape and set(np.unique(made)) == {0, 2}
    assert (made[:8, :8] == made[0, 0]).all() and made[0, 8] == 2 and made[0, 16] == 0 and made[16, 0] == 0


# --- masks that are painted -------------------------------------------------------------------------------------------


def test_strokes_are_round_lines_and_the_last_one_is_above():
    sent = [{"k": 2, "r": 3, "p": [[10, 10], [30, 10]]}, {"k": 0, "r": 2, "p": [[20, 10]]}]
    made = painted(strokes_of(sent), (21, 41))
    assert made.shape == (21, 41) and set(np.unique(made)) == {NOTHING, 0, 2}
    assert made[10, 8] == made[10, 32] == made[8, 15] == 2 and made[10, 20] == 0
    assert made[10, 5] == made[10, 36] == made[15, 15] == made[5, 15] == NOTHING


def test_the_eraser_takes_away_and_strokes_may_leave_the_picture():
    made = painted([Stroke(1, 50, ((-5, 3),)), Stroke(NOTHING, 2, ((8, 4),))], (9, 17))
    assert made[4, 8] == NOTHING and made[0, 0] == made[8, 16] == 1


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "strokes",
        [{"k": 1}],
        [{"k": 9, "r": 2, "p": [[1, 1]]}],
        [{"k": 1, "r": 0, "p": [[1, 1]]}],
        [{"k": 1, "r": 2, "p": []}],
        [{"k": 1, "r": 2, "p": [[1, 1e9]]}],
        [{"k": 1, "r": 2, "p": [[1, float("nan")]]}],
        [{"k": 1, "r": 2, "p": [[1, 1]] * 100_001}],
    ],
)
def test_strokes_that_nobody_draws_are_refused(sent):
    with pytest.raises(ValueError, match="strokes: expected"):
        strokes_of(sent)


def test_what_is_not_painted_is_background_or_unknown():
    over = np.array([[NOTHING, 0, 3]], np.int16)
    base = np.array([[2, 2, 0]], np.uint8)
    assert mask_of(None, over).tolist() == [[0, 0, 3]]
    assert mask_of(None, over, "unknown").tolist() == [[255, 0, 3]]
    assert mask_of(base, over).tolist() == [[2, 0, 3]]
    assert mask_of(np.array([[0, 2, 0]], np.uint8), over, "unknown").tolist() == [[255, 0, 3]]


def test_brushes_have_the_colours_that_labels_are_shown_in():
    assert brush_colors(2) == ["#800000", "#008000", "#000000"]
