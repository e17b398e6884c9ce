"""Photographs of every kind become RGB of 8 bits by one rule; what cannot be read is named."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from afa_model.data.photographs import PhotographError, is_image_name, opened, read_photograph, sizes
from afa_model.runtime.notices import forget_notices

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture(autouse=True)
def fresh_notices():
    forget_notices()


def saved(path, array, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


# ranges


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.uint16) * 257, GREY),  # all of 16 bits
        (np.append(GREY.ravel(), 255).astype(np.uint16).reshape(7, 7), None),  # 8 bits in 16: as they are
        (np.linspace(0, 4095, 48).reshape(6, 8).astype(np.uint16), np.linspace(0, 255, 48).reshape(6, 8)),
        (np.linspace(0, 1, 48).reshape(6, 8).astype(np.float32), np.linspace(0, 255, 48).reshape(6, 8)),
        (GREY.astype(np.float32), GREY),
        (GREY.astype(np.int32) * 257, GREY),
        (np.linspace(-3, 9, 48).reshape(6, 8).astype(np.float32), np.linspace(0, 255, 48).reshape(6, 8)),
        (np.linspace(70_000, 90_000, 48).reshape(6, 8).astype(np.int32), np.linspace(0, 255, 48).reshape(6, 8)),
        (np.full((6, 8), -2, np.int32), np.zeros((6, 8))),
    ],
    ids=["16", "8in16", "12in16", "0..1", "0..255", "32", "signed", "wide", "one value"],
)
def test_other_ranges_are_scaled(tmp_path, values, expected):
    photo = read_photograph(saved(tmp_path / "x.tif", values))
    expected = values if expected is None else expected
    assert photo.shape == (*values.shape, 3) and photo.dtype == np.uint8
    assert np.abs(photo[..., 1] - expected).max() <= 0.55 and (photo[..., 0] == photo[..., 2]).all()


def test_a_dark_photograph_of_16_bits_keeps_its_darkness(tmp_path):
    """15 bits are no camera's: 20,000 of 65,535 stay a third of white."""
    photo = read_photograph(saved(tmp_path / "x.png", np.full((4, 4), 20_000, np.uint16)))
    assert (photo == round(20_000 / 257)).all()


def test_each_kind_of_scaling_is_said_once(tmp_path, capsys):
    for name in "ab":
        read_photograph(saved(tmp_path / f"{name}.png", GREY.astype(np.uint16) * 257))
        read_photograph(saved(tmp_path / f"{name}.tif", (GREY / 255).astype(np.float32)))
    read_photograph(saved(tmp_path / "plain.png", GREY))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "a.png" in lines[0] and "0..65535" in lines[0] and "fractions" in lines[1]


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(PhotographError, match=r"x\.tif: holds values that are no finite"):
        read_photograph(saved(tmp_path / "x.tif", np.array([[0.5, np.nan]], np.float32)))


def png(pixels, bits: int, colour_type: int, spare: int = 0) -> bytes:
    """A PNG of such samples as Pillow does not write; ``spare`` bytes follow the last row."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes() for row in pixels) + bytes(spare)
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_read_or_refused_where_8_bits_would_be_black(tmp_path):
    colours = np.random.default_rng(0).integers(0, 65_536, (5, 6, 3))
    (tmp_path / "x.png").write_bytes(png(colours, 16, 2))
    assert np.abs(read_photograph(tmp_path / "x.png") - colours / 257).max() <= 1.01
    (tmp_path / "x.png").write_bytes(png(colours // 16, 16, 2))
    with pytest.raises(PhotographError, match=r"x\.png: 16-bit colours of which less than 14 bits"):
        read_photograph(tmp_path / "x.png")


# kinds


def test_transparency_is_laid_over_white(tmp_path):
    half = np.zeros((2, 2, 4), np.uint8)
    half[0, 0] = (255, 0, 0, 128)
    half[1, 1] = (9, 8, 7, 255)
    photo = read_photograph(saved(tmp_path / "x.png", half))
    assert photo[0, 1].tolist() == [255] * 3 and photo[1, 1].tolist() == [9, 8, 7]
    assert photo[0, 0, 0] == 255 and abs(int(photo[0, 0, 1]) - 127) <= 1
    grey = saved(tmp_path / "la.png", Image.merge("LA", (Image.new("L", (2, 2), 40), Image.new("L", (2, 2), 0))))
    assert (read_photograph(grey) == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = read_photograph(saved(tmp_path / "p.png", palette, transparency=0))
    assert pixels.tolist() == [[[255] * 3, [40, 50, 60]]]


def test_one_bit_cmyk_and_the_first_frame(tmp_path):
    bits = np.array([[True, False], [False, True]])
    assert read_photograph(saved(tmp_path / "b.png", bits))[..., 0].tolist() == [[255, 0], [0, 255]]
    cmyk = saved(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.abs(read_photograph(cmyk)[8, 8].astype(int) - (255, 0, 0)).max() <= 6
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_photograph(gif)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif", "tif", "Jpg", "JPEG", "png", "jp2", "ppm"])
def test_thin_photographs_and_formats(tmp_path, suffix):
    for size in ((1, 400), (2, 2), (300, 1)):
        photo = read_photograph(saved(tmp_path / f"x.{suffix}", Image.new("RGB", size, (120, 120, 120))))
        assert photo.shape == (size[1], size[0], 3) and np.abs(photo.astype(int) - 120).max() <= 3
    assert is_image_name(f"x.{suffix}") and not is_image_name(f"._x.{suffix}") and not is_image_name("x.txt")


# EXIF


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_is_applied_or_ignored(tmp_path, suffix, turn):
    """A mark in the corner that is the upper left one upright, by EXIF's own table of the eight."""
    upright = np.full((16, 24), 250, np.uint8)
    upright[:8, :8] = 10
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright.T[::-1, ::-1], 8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[274] = turn
    path = saved(tmp_path / f"x.{suffix}", np.ascontiguousarray(stored), exif=exif)
    assert np.abs(read_photograph(path)[..., 0].astype(int) - upright).max() < 40
    assert np.abs(read_photograph(path, "ignore")[..., 0].astype(int) - stored).max() < 40
    with opened(path) as image:
        assert sizes(image) == (stored.shape[::-1], upright.shape[::-1])


@pytest.mark.parametrize("block", [b"", b"garbage", b"II*\0\x08\0", b"MM\0*\0\0\0\x08\0\x05\x01\x12\0\x02"])
def test_a_broken_exif_block_does_not_matter(tmp_path, block):
    path = saved(tmp_path / "x.jpg", np.repeat(GREY, 2, 1), exif=b"Exif\0\0" + block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_photograph(path).shape == (6, 16, 3)


@pytest.mark.parametrize("entry", [(3, 1, 0), (3, 1, 9), (2, 2, b"6"), (1, 1, 6), (5, 1, 8), (3, 2, 6)])
def test_an_orientation_that_is_none_turns_nothing_or_what_it_says(tmp_path, entry):
    """Of the types that EXIF knows: text, a byte, a fraction, two numbers for one."""
    kind, count, value = entry
    field = value + b"\0\0\0" if isinstance(value, bytes) else struct.pack("<HH", value, value if count == 2 else 0)
    block = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 274, kind, count) + field + bytes(20)
    shape = read_photograph(saved(tmp_path / "x.jpg", GREY, exif=block)).shape
    assert shape == ((8, 6, 3) if entry == (3, 2, 6) else (6, 8, 3))


# what cannot be read


def test_what_is_wrong_is_named(tmp_path):
    good = saved(tmp_path / "good.png", np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 255
    files = {
        "cut.png": (good[:-300], "cannot be decoded"),
        "damaged.png": (bytes(damaged), "cannot be decoded"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"hello\n", "it is a text"),
        "page.jpg": (b"\n<!DOCTYPE HTML><p>404", "it is a web page"),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        "bytes.jpg": (bytes(range(256)), "its format is not known"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PhotographError, match=words) as caught:
            read_photograph(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    for name, words in (("gone.jpg", "not found"), ("", "a folder")):
        with pytest.raises(PhotographError, match=words):
            read_photograph(tmp_path / name)


def test_damage_that_the_decoder_does_not_see_is_seen(tmp_path):
    """It stops when it has all rows; the end of the stream, and the sum there, may come later."""
    path = tmp_path / "x.png"
    path.write_bytes(content := png(GREY, 8, 0, spare=100))
    assert (read_photograph(path)[..., 0] == GREY).all()
    path.write_bytes(content[:-16] + bytes([content[-16] ^ 1]) + content[-15:])
    with pytest.raises(PhotographError, match="the file is damaged"):
        read_photograph(path)


def test_text_in_a_png_is_no_reason_to_refuse_it(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 3_000_000, zip=True)
    path = saved(tmp_path / "x.png", GREY, pnginfo=text)
    assert (read_photograph(path)[..., 0] == GREY).all()


def test_the_limit_on_pixels_is_a_setting_and_pillows_own_stays(tmp_path):
    path = saved(tmp_path / "x.png", GREY)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(PhotographError, match=r"8x6 pixels, more than the limit max_pixels = 47"):
        read_photograph(path, max_pixels=47)
    assert read_photograph(path, max_pixels=48).shape == (6, 8, 3)
    with pytest.MonkeyPatch.context() as patch:  # twice Pillow's limit is its error, once its warning
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        assert read_photograph(path, max_pixels=None).shape == (6, 8, 3)
        assert Image.MAX_IMAGE_PIXELS == 20
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("top", [1.0001, 1.2, 2.0])
def test_fractions_a_little_over_one_are_cut_off_at_one(tmp_path, top):
    values = np.array([[0, 0.5, 1, top]], np.float32)
    assert read_photograph(saved(tmp_path / "x.tif", values))[0, :, 0].tolist() == [0, 128, 255, 255]
