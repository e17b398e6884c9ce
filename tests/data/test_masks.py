"""Masks as programs save them: every value or colour is its own class, or an error says which setting fits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.voc_factory import make_voc

from afa_model.config import find_config, from_dict, parse, to_dict
from afa_model.data.classes import voc_palette
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label
from afa_model.data.masks import MaskRules, read_mask
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError
from afa_model.runtime.notices import forget_notices

CLASSES = np.array([[0, 1, 15], [15, 255, 20]], np.uint8)
VOC = MaskRules(21)


@pytest.fixture(autouse=True)
def fresh_notices():
    forget_notices()


def grey_png(path, samples: np.ndarray, bits: int):
    """A PNG of grey samples of 1 to 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    for row in samples:
        text = "".join(f"{sample:0{bits}b}" for sample in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def palette_png(path, values: np.ndarray, palette) -> object:
    image = Image.fromarray(values)
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    image.save(path)
    return path


def sorted_anew(classes: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and palette as a program leaves them that keeps the colours that occur, the brightest first."""
    present = sorted(np.unique(classes).tolist(), key=lambda index: -int(palette[index].astype(int).sum()))
    return np.vectorize(present.index)(classes).astype(np.uint8), palette[present]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_samples_are_read_as_stored(tmp_path, bits):
    samples = np.arange(10).reshape(2, 5) % min(1 << bits, 21)
    path = grey_png(tmp_path / "x.png", samples, bits)
    assert (read_mask(path, VOC).classes == samples).all() and (read_label(path).numpy() == samples).all()


def test_a_palette_sorted_anew_is_read_by_colour(tmp_path):
    values, palette = sorted_anew(CLASSES, voc_palette())
    mask = read_mask(palette_png(tmp_path / "x.png", values, palette), VOC)
    assert (mask.classes == CLASSES).all() and mask.kind == "moved palette" and values[0, 0] != 0
    by_index = read_mask(tmp_path / "x.png", MaskRules(21, by_colour=False))
    assert (by_index.classes == values).all()
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    values, palette = sorted_anew(CLASSES, grey)
    assert (read_mask(palette_png(tmp_path / "x.png", values, palette), VOC).classes == CLASSES).all()


def test_a_palette_of_ones_own_leaves_the_indices(tmp_path):
    values = np.array([[0, 1], [1, 2]], np.uint8)
    for palette in (
        [(0, 0, 0), (255, 0, 0), (0, 255, 0)],
        [(9, 9, 9)] * 3,
        [(255, 255, 255), (0, 0, 0), (3, 200, 9)],
    ):
        mask = read_mask(palette_png(tmp_path / "x.png", values, palette), VOC)
        assert (mask.classes == values).all() and mask.kind == "palette"


def test_white_before_black_is_refused_until_it_is_said_which_is_the_object(tmp_path):
    path = palette_png(tmp_path / "x.png", np.array([[0, 1]], np.uint8), [(255, 255, 255), (0, 0, 0)])
    with pytest.raises(ValueError, match=r"white for 0 and black for 1.*data\.mask_palette: index"):
        read_mask(path, VOC)
    assert read_mask(path, MaskRules(21, by_colour=False)).classes.tolist() == [[0, 1]]
    assert read_mask(path, MaskRules(21, mask_values={0: 1, 1: 0})).classes.tolist() == [[1, 0]]


def test_a_palette_that_is_half_vocs_is_refused(tmp_path):
    path = palette_png(tmp_path / "x.png", np.array([[0, 1, 2]], np.uint8), [(0, 0, 0), (0, 128, 0), (1, 2, 3)])
    with pytest.raises(ValueError, match=r"value 1 has the colour \(0, 128, 0\), VOC's of class 2.*palette: index"):
        read_mask(path, VOC)
    assert read_mask(path, MaskRules(21, by_colour=False)).classes.tolist() == [[0, 1, 2]]


def test_colours_are_vocs_or_grey_levels_or_refused(tmp_path):
    colours = Image.fromarray(voc_palette()[CLASSES])
    for mode in ("RGB", "RGBA"):
        colours.convert(mode).save(tmp_path / "x.png")
        mask = read_mask(tmp_path / "x.png", VOC)
        assert (mask.classes == CLASSES).all() and mask.kind == "colours"
    Image.fromarray(CLASSES).convert("RGB").save(tmp_path / "x.png")
    assert (read_mask(tmp_path / "x.png", VOC).classes == CLASSES).all()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"image mode RGB with colours that are no class's \(\(1, 2, 3\)\)"):
        read_mask(tmp_path / "x.png", VOC)
    with pytest.raises(ValueError, match="colours that are no class's"):  # VOC's class 20 of 3 classes
        Image.new("RGB", (2, 2), tuple(voc_palette()[20].tolist())).save(tmp_path / "x.png")
        read_mask(tmp_path / "x.png", MaskRules(3))
    colours.save(tmp_path / "x.jpg", quality=95)
    with pytest.raises(ValueError, match="JPEG: its pixels are not kept exactly"):
        read_mask(tmp_path / "x.jpg", VOC)
    Image.new("RGBA", (2, 2), (0, 0, 0, 7)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="transparent"):
        read_mask(tmp_path / "x.png", VOC)


def test_grey_levels_in_three_channels_are_no_colours(tmp_path):
    """VOC's car is grey, (128, 128, 128)."""
    Image.fromarray(np.array([[0, 128]], np.uint8)).convert("RGB").save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"label 128 outside 0\.\.20"):
        read_mask(tmp_path / "x.png", VOC)
    assert read_mask(tmp_path / "x.png", MaskRules(21, mask_values={128: 1})).classes.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values_and_what_is_ignored_are_settings(tmp_path, dtype):
    Image.fromarray(np.array([[0, 7, 254, 255]], dtype)).save(tmp_path / "x.png")
    for rules, expected in (
        (MaskRules(21, ignore_index=254), [0, 7, 255, 255]),
        (MaskRules(21, mask_values={255: 1, 254: 2}), [0, 7, 2, 1]),
        (MaskRules(3, mask_values={254: 255, 7: 2, 0: 1}), [1, 2, 255, 255]),
        (MaskRules(21, ignore_index=0, mask_values={254: 20}), [255, 7, 20, 255]),
    ):
        assert read_mask(tmp_path / "x.png", rules).classes.tolist() == [expected]
    told = r"label 254 outside 0\.\.20 and 255 .*data\.ignore_index: 254; if 255 is the background, every class is one"
    with pytest.raises(ValueError, match=told):
        read_mask(tmp_path / "x.png", VOC)


def test_which_setting_fits_is_said(tmp_path):
    for values, words in (
        ([0, 17, 34], r"4 bits\? data\.mask_values: \{0: 0, 17: 1, 34: 2\}"),
        ([0, 85, 170], r"2 bits\? data\.mask_values: \{0: 0, 85: 1, 170: 2\}"),
        ([0, 40], r"label 40 outside 0\.\.4.*data\.mask_values says"),
        (range(100), r"label 5, 6, 7, 8, 9, \.\.\. outside.*a photograph, or grey levels"),
    ):
        Image.fromarray(np.array([list(values)], np.uint8)).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=words):
            read_mask(tmp_path / "x.png", MaskRules(5))
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"data\.ignore_index: 65535"):
        read_mask(tmp_path / "x.png", VOC)
    assert read_mask(tmp_path / "x.png", MaskRules(21, 65535)).classes.tolist() == [[0, 255]]


# the whole data set


def settings(root, **changes) -> DataSettings:
    return DataSettings(root=str(root), num_workers=0, **changes)


def mask_of(root, number: int = 0):
    return root / "SegmentationClassAug" / f"2007_{number:06d}.png"


def test_a_set_with_sorted_and_coloured_masks_reads_as_before(tmp_path, capsys):
    make_voc(tmp_path, count=4)
    before = EvaluationSet(settings(tmp_path))
    labels, masks = before.labels, [before[i]["mask"] for i in range(4)]
    values, palette = sorted_anew(masks[0].numpy(), voc_palette())
    palette_png(mask_of(tmp_path, 0), values, palette)
    Image.fromarray(voc_palette()[masks[1]]).save(mask_of(tmp_path, 1))
    mask_of(tmp_path, 2).rename(mask_of(tmp_path, 2).with_suffix(".PNG"))
    for level in ("full", "headers", "off"):
        after = EvaluationSet(settings(tmp_path, check=level))
        assert (after.labels == labels).all() and all((after[i]["mask"] == masks[i]).all() for i in range(4))
    lines = capsys.readouterr().err.splitlines()
    assert sum("1 of 4 masks have a palette in another order" in line for line in lines) == 1
    assert sum("1 of 4 masks hold colours: read as VOC's" in line for line in lines) == 1


@pytest.mark.parametrize("level", ["full", "off"])
def test_masks_of_0_and_255_are_refused_until_it_is_said_what_255_is(tmp_path, level):
    make_voc(tmp_path, count=3)
    for number in range(3):
        white = np.where(read_label(mask_of(tmp_path, number)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(white).save(mask_of(tmp_path, number))
    with pytest.raises(DataError, match=r"000002\.png: holds 0 and 255 alone.*data\.mask_values: \{255: 1\}"):
        EvaluationSet(settings(tmp_path, check=level))
    with pytest.raises(DataError, match=r"empty annotation.*data\.mask_values: \{255: 1\}"):
        TrainingSet(settings(tmp_path, check=level))
    data = EvaluationSet(settings(tmp_path, check=level, mask_values={0: 0, 255: 1}, num_classes=21))
    assert data.labels[:, 0].tolist() == [1, 1, 1] and data[0]["mask"].unique().tolist() == [0, 1]
    assert EvaluationSet(settings(tmp_path, check=level, mask_values={255: 255})).labels.sum() == 0
    # Beside grey masks of classes, one with nothing but ignored pixels is as usual.
    Image.fromarray(np.full((48, 64), 3, np.uint8)).save(mask_of(tmp_path, 0))
    assert EvaluationSet(settings(tmp_path, check=level)).labels.sum() == 1


@pytest.mark.parametrize("step", [10, 12, 17])
def test_a_palette_that_fits_classes_in_one_mask_alone_is_refused(tmp_path, step):
    """A palette of grey levels: 12 is a class's number, 228 is none, and what the palette means is one for all."""
    make_voc(tmp_path, count=2)
    palette = [(step * value % 256,) * 3 for value in range(25)]
    for number, values in ((0, (0, 1)), (1, (0, 14))):
        shape = read_label(mask_of(tmp_path, number)).shape
        palette_png(mask_of(tmp_path, number), np.resize(np.array(values, np.uint8), shape), palette)
    with pytest.raises(DataError, match=r"000001\.png: the colour .* of value 14 is no class's.*mask_palette: index"):
        EvaluationSet(settings(tmp_path))
    assert EvaluationSet(settings(tmp_path, mask_palette="index")).labels.nonzero()[:, 1].tolist() == [0, 13]


def test_vocs_palette_with_two_colours_exchanged_is_refused(tmp_path):
    palette = voc_palette()
    palette[[2, 4]] = palette[[4, 2]]
    palette_png(tmp_path / "x.png", np.array([[0, 2, 255]], np.uint8), palette.tolist())
    with pytest.raises(ValueError, match=r"value 2 has the colour of class 4, but value 255 has its own.*mask_palette"):
        read_mask(tmp_path / "x.png", VOC)
    rules = MaskRules(21, by_colour=False)
    assert read_mask(tmp_path / "x.png", rules).classes.tolist() == [[0, 2, 255]]


def test_palettes_that_contradict_each_other_are_refused(tmp_path):
    make_voc(tmp_path, count=2)
    shape = read_label(mask_of(tmp_path, 0)).shape, read_label(mask_of(tmp_path, 1)).shape
    palette_png(mask_of(tmp_path, 0), np.full(shape[0], 1, np.uint8), [(0, 0, 0), (250, 0, 0), (0, 250, 0)])
    palette_png(mask_of(tmp_path, 1), np.full(shape[1], 2, np.uint8), [(0, 0, 0), (0, 250, 0), (250, 0, 0)])
    with pytest.raises(DataError, match=r"000001\.png: colour \(250, 0, 0\) is value 2 here and 1 in .*000000\.png"):
        EvaluationSet(settings(tmp_path))
    assert EvaluationSet(settings(tmp_path, mask_palette="index")).labels.sum(0)[:2].tolist() == [1, 1]


# EXIF


def turn_photo(root, orientation: int, number: int = 0) -> None:
    path = root / "JPEGImages" / f"2007_{number:06d}.jpg"
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_photographs_are_turned_or_not_as_is_said(tmp_path, kind):
    make_voc(tmp_path, count=2)
    stored = EvaluationSet(settings(tmp_path))[0]["image"]
    turn_photo(tmp_path, 3)
    exact = AugmentSettings(crop=48, scale=(1, 1), flip=0)
    for exif, expected in (("apply", stored.flip((-1, -2))), ("ignore", stored)):
        if kind == "evaluation":
            image = EvaluationSet(settings(tmp_path, exif=exif))[0]["image"]
        else:
            data = TrainingSet(settings(tmp_path, exif=exif), exact)
            image = data[0, 1]["image"]
            errors = [(image - expected[:, :, left : left + 48]).abs().mean() for left in range(17)]
            assert min(errors) < 0.15, exif
            continue
        assert (image - expected).abs().mean() < 0.15, exif


def test_a_turned_photograph_beside_an_upright_mask_is_said(tmp_path, capsys):
    make_voc(tmp_path, count=3)
    turn_photo(tmp_path, 3, 1)
    EvaluationSet(settings(tmp_path))
    line = capsys.readouterr().err
    assert "EXIF turns 1 of 3 photographs" in line and "2007_000001.png" in line and "data.exif: ignore" in line
    EvaluationSet(settings(tmp_path, exif="ignore"))
    assert "as the pixels are stored; if they are not, set data.exif: apply" in capsys.readouterr().err
    turn_photo(tmp_path, 6, 1)
    with pytest.raises(DataError, match=r"65x48 .* has 48x65 turned .* \(orientation 6\); data\.exif: ignore"):
        EvaluationSet(settings(tmp_path))
    assert EvaluationSet(settings(tmp_path, exif="ignore"))[1]["image"].shape == (3, 48, 65)
    turned = read_label(mask_of(tmp_path, 1)).rot90(-1)
    Image.fromarray(turned.numpy().astype(np.uint8)).save(mask_of(tmp_path, 1))
    with pytest.raises(DataError, match=r"not turned as its EXIF says \(orientation 6\); data\.exif: apply would fit"):
        EvaluationSet(settings(tmp_path, exif="ignore"))
    assert EvaluationSet(settings(tmp_path))[1]["mask"].shape == (65, 48)


def test_a_size_that_the_check_did_not_look_at_is_an_error_of_the_sample(tmp_path):
    make_voc(tmp_path, count=2)
    turn_photo(tmp_path, 6, 1)
    data = EvaluationSet(settings(tmp_path, check="off"))
    with pytest.raises(DataError, match=r"2007_000001\.png: 65x48 pixels, its photograph has 48x65"):
        data[1]


# settings


def test_the_settings_come_through_yaml_the_command_line_and_a_checkpoint(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data:\n  mask_values:\n    255: 1\n  xml_skip: [hand, foot]\n")
    config = parse(["--config", str(file), "--data.ignore_index", "254", "--data.exif", "ignore"])
    assert config.data.mask_values == {255: 1} and config.data.xml_skip == ("hand", "foot")
    assert config.data.ignore_index == 254 and from_dict(to_dict(config)) == config
    assert parse(["--data.mask_values", "{0: 0, 255: 1}"]).data.mask_values == {0: 0, 255: 1}


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_the_published_runs_read_photographs_as_they_are_stored(name):
    assert yaml.safe_load(Path(find_config(name)).read_text())["data"]["exif"] == "ignore"


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask_values", {0: 300}), ("mask_values", {-1: 0}),
     ("mask_values", {255: 1.5}), ("mask_values", 7), ("mask_values", {"a": 1}),
     ("ignore_index", -1), ("exif", "maybe"), ("max_pixels", 0), ("mask_palette", "voc")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        DataSettings(**{name: value})


def test_a_class_that_is_none_is_named(tmp_path):
    make_voc(tmp_path, count=1)
    with pytest.raises(DataError, match=r"data\.mask_values: class 30 outside 0\.\.20"):
        EvaluationSet(settings(tmp_path, mask_values={1: 30}))
