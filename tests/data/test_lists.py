"""Lists of images as people write them: the file that a line names is loaded, or an error names the line."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.voc_factory import make_voc

from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label
from afa_model.data.lists import list_file
from afa_model.data.order import training_loader
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError
from afa_model.runtime.notices import forget_notices

NAMES = [f"2007_{i:06d}" for i in range(3)]


def settings(root, **changes) -> DataSettings:
    return DataSettings(root=str(root), num_workers=0, **changes)


@pytest.fixture
def root(tmp_path):
    make_voc(tmp_path / "data", count=3)
    return tmp_path / "data"


def data_of(root, lines: str | bytes, **changes) -> EvaluationSet:
    path = root / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    return EvaluationSet(settings(root, **changes))


def photo(path, level: int, size=(6, 5)) -> None:
    """A plain photograph, or a mask of one class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


def levels(data: EvaluationSet) -> list[int]:
    return [int(data.read_photo(i).float().mean()) for i in range(len(data))]


FORMS = {
    "names": "{0}\n{1}\n{2}",
    "crlf and empty lines": "{0}\r\n\r\n{1}  \r\n\t{2}\r\n",
    "old mac": "{0}\r{1}\r{2}",
    "comments": "# the list\n{0}\n{1} # good\n{2}",
    "files": "{0}.jpg\n{1}.jpg\n{2}.jpg",
    "dotslash": "./JPEGImages/{0}.jpg\n./{1}.jpg\n././{2}",
    "from the root": "JPEGImages/{0}.jpg\n/JPEGImages/{1}.jpg\nJPEGImages/{2}",
    "from above": "data/JPEGImages/{0}.jpg\ndata/JPEGImages/{1}.jpg\n/data/JPEGImages/{2}.jpg",
    "backslashes": "JPEGImages\\{0}.jpg\n.\\JPEGImages\\{1}.jpg\n\\JPEGImages\\{2}.jpg",
    "quoted": "\"{0}\"\n'JPEGImages/{1}.jpg'\n\"{2}.jpg\"",
    "two columns": "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png\n/JPEGImages/{1}.jpg\t/SegmentationClassAug/{1}.png"
    "\n{2}.jpg,{2}.png",
    "a class's list": "{0}  1\n{1} -1\n{2}  0",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_lines(root, form):
    data = data_of(root, FORMS[form].format(*NAMES))
    assert data.names == NAMES and [data.photo_path(i).stem for i in range(3)] == NAMES
    assert data.labels.sum(1).tolist() == [1, 2, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-8"])
def test_encodings(root, encoding):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (root / folder / f"{NAMES[1]}.{suffix}").rename(root / folder / f"tür é.{suffix}")
    assert data_of(root, f"{NAMES[0]}\ntür é\n".encode(encoding)).names == [NAMES[0], "tür é"]


def test_the_two_ways_to_write_an_accent(root):
    decomposed = unicodedata.normalize("NFD", "é")
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (root / folder / f"{NAMES[1]}.{suffix}").rename(root / folder / f"{decomposed}.{suffix}")
    data = data_of(root, "é\n")
    assert data.photo_path(0).is_file() and data[0]["mask"].shape == (48, 65)


@pytest.mark.parametrize(
    "line",
    [
        "SegmentationClassAug/{}.png",
        "/SegmentationClassAug/{}",
        "{root}/SegmentationClassAug/{}.png",
        "data/SegmentationClassAug/{}.png",
        "SegmentationClassAug/{0}.png JPEGImages/{0}.jpg",
    ],
)
def test_a_list_of_masks_is_no_list_of_photographs(root, line):
    lines = [NAMES[1], line.format(NAMES[0], root=root)]
    with pytest.raises(DataError, match=r"val\.txt line 2: .* lies in SegmentationClassAug, ") as caught:
        data_of(root, "\n".join(lines))
    assert ("columns swapped?" in str(caught.value)) == (" JPEG" in line)


def test_photographs_and_masks_in_one_folder(root):
    for path in (root / "SegmentationClassAug").iterdir():
        path.rename(root / "JPEGImages" / path.name)
    data = data_of(root, "\n".join(NAMES), mask_dir="JPEGImages")
    assert [data.photo_path(i).suffix for i in range(3)] == [".jpg"] * 3 and data.labels.sum(1).tolist() == [1, 2, 1]
    with pytest.raises(DataError, match=rf"{NAMES[0]}\.png: photograph and mask are the same file"):
        data_of(root, f"{NAMES[0]}.png", mask_dir="JPEGImages")


def test_of_two_files_of_one_name_none_gets_the_others_mask_or_label(root):
    for folder, level in (("a", 10), ("b", 20)):
        photo(root / "JPEGImages" / folder / "x.png", level)
    photo(root / "SegmentationClassAug" / "x.png", 1)
    with pytest.raises(DataError, match=r"b/x: the mask SegmentationClassAug/x\.png is that of a/x too"):
        data_of(root, "a/x\nb/x")
    labels = root / "labels.json"
    labels.write_text('{"x.jpg": ["cat"]}')
    (root / "list.txt").write_text("a/x\nb/x")
    own = settings(root, train_split=str(root / "list.txt"), label_file=str(labels))
    with pytest.raises(DataError, match=r"b/x: in labels\.json the entry x\.jpg is that of a/x too"):
        TrainingSet(own)
    labels.write_text('{"photos/a/x.jpg": ["cat"]}')
    with pytest.raises(DataError, match=r"1 of 2 images.*\n.*b/x: no entry in labels\.json"):
        TrainingSet(own)
    labels.write_text('{"a/x.jpg": ["cat"], "b/x.jpg": ["dog"]}')
    assert TrainingSet(own).labels.nonzero()[:, 1].tolist() == [7, 11]  # masks are not needed


def test_integer_keys_that_two_images_share_are_refused(root):
    for name in ("img_1", "other_1"):
        photo(root / "JPEGImages" / f"{name}.png", 10)
    np.save(root / "x.npy", {1: np.eye(20)[3]})
    (root / "list.txt").write_text("img_1\nother_1")
    with pytest.raises(DataError, match=r"other_1: in x\.npy the entry 1 is that of img_1 too"):
        TrainingSet(settings(root, train_split=str(root / "list.txt"), label_file=str(root / "x.npy")))


def test_a_name_that_begins_with_a_number_sign_is_no_comment(root):
    photo(root / "JPEGImages" / "#1.png", 10)
    photo(root / "SegmentationClassAug" / "#1.png", 1)
    assert data_of(root, "#1\n# a comment\n").names == ["#1"]
    with pytest.raises(DataError, match=r"JPEGImages/#2\.jpg: not found \(line 2 of val\.txt\)"):
        data_of(root, "#1\n#2\n")
    assert data_of(root, f"{NAMES[0]}\n#{NAMES[1]}\n").names == NAMES[:1]


def test_headers_and_jpeg_masks_are_told(root):
    with pytest.raises(DataError, match=r"line 1: 'image,mask' is no photograph \(a header\?"):
        data_of(root, f"image,mask\n{NAMES[0]}")
    photo(root / "JPEGImages" / "y.png", 10)
    photo(root / "SegmentationClassAug" / "y.JPG", 1)
    with pytest.raises(DataError, match=r"y\.png: not found \(y\.JPG is there"):
        data_of(root, "y")


def test_absolute_paths(root, tmp_path):
    photo(tmp_path / "elsewhere" / "x.png", 77)
    photo(root / "SegmentationClassAug" / "x.png", 1)
    data = data_of(root, f"{root}/JPEGImages/{NAMES[0]}.jpg\n{tmp_path}/elsewhere/x.png\n")
    assert data.names == [NAMES[0], "x"] and data.photo_path(1) == tmp_path / "elsewhere" / "x.png"
    assert levels(data)[1] == 77 and data[1]["mask"].unique().tolist() == [1]
    with pytest.raises(DataError, match=rf"/nowhere/{NAMES[0]}\.jpg: not found \(line 1 of val\.txt\)"):
        data_of(root, f"/nowhere/{NAMES[0]}.jpg\n")


def test_names_with_spaces_are_whole_names(root):
    for name, level in (("holiday 1", 10), ("holiday 2", 20), ("2007_000000 crop", 30)):
        photo(root / "JPEGImages" / f"{name}.png", level)
        photo(root / "SegmentationClassAug" / f"{name}.png", 1)
    data = data_of(root, f"holiday 1\nholiday 2.png\n2007_000000 crop\n{NAMES[0]}\n")
    assert data.names == ["holiday 1", "holiday 2", "2007_000000 crop", NAMES[0]] and levels(data)[:3] == [10, 20, 30]
    columns = data_of(root, "JPEGImages/holiday 1.png SegmentationClassAug/holiday 2.png\nholiday 2.png holiday 1.png")
    assert [columns.mask_path(i).stem for i in range(2)] == ["holiday 2", "holiday 1"]


@pytest.mark.parametrize(
    "line", ["2007_000000 crop", "2007_000000 1", "2007_000000 crop.png", "2007_000000.jpg 7", "2007_000000 (copy)"]
)
def test_a_name_that_is_not_there_never_loads_another_file(root, line):
    photo(root / "SegmentationClassAug" / "1.png", 1)
    with pytest.raises(DataError, match="line 2") as caught:
        data_of(root, f"{NAMES[1]}\n{line}\n")
    assert line in caught.value.problems[0] and len(caught.value.problems) == 1


def test_numbers_behind_every_name_are_a_classs_list_only_with_minus_one(root):
    """`holiday 1` and `holiday 0` are names of photographs."""
    with pytest.raises(DataError, match=f"'{NAMES[0]} 1': no photograph of this name"):
        data_of(root, f"{NAMES[0]} 1\n{NAMES[1]} 0\n")


def test_a_bare_name_is_one_in_the_photographs_folder(root):
    photo(root / "x.png", 5)
    with pytest.raises(DataError, match=r"JPEGImages/x\.jpg: not found \(line 1 of val\.txt\)"):
        data_of(root, "x\n")


def test_a_mask_that_a_line_names_is_the_one_that_is_read(root):
    write = root / "other" / f"{NAMES[0]}.png"
    photo(write, 9, (64, 48))
    data = data_of(root, f"JPEGImages/{NAMES[0]}.jpg other/{NAMES[0]}.png\n")
    assert data[0]["mask"].unique().tolist() == [9] and data.labels[0, 8] == 1
    write.unlink()
    with pytest.raises(DataError, match=rf"other/{NAMES[0]}\.png: not found"):
        data_of(root, f"JPEGImages/{NAMES[0]}.jpg other/{NAMES[0]}.png\n")


def test_the_ending_that_a_line_names_decides(root):
    for suffix, level in (("png", 5), ("bmp", 6)):
        photo(root / "JPEGImages" / f"{NAMES[0]}.{suffix}", level, (64, 48))
    for suffix, level in (("png", 5), ("bmp", 6), ("BMP", 6)):
        assert levels(data_of(root, f"{NAMES[0]}.{suffix}")) == [level]
    with pytest.raises(DataError, match=rf"JPEGImages/{NAMES[0]}\.tif: not found"):
        data_of(root, f"{NAMES[0]}.tif")


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif", "tif", "Jpg", "JPEG", "PNG", "tiff", "jfif"])
def test_photographs_and_masks_of_any_ending(root, suffix):
    (root / "JPEGImages" / f"{NAMES[0]}.jpg").unlink()
    photo(root / "JPEGImages" / "sub" / f"x.{suffix}", 60, (64, 48))
    photo(root / "JPEGImages" / "sub" / f"._x.{suffix}", 60, (64, 48))
    (root / "SegmentationClassAug" / f"{NAMES[0]}.png").rename(root / "SegmentationClassAug" / "x.PNG")
    for line in ("sub/x", f"sub/x.{suffix}", f"JPEGImages/sub/x.{suffix}"):
        data = data_of(root, f"{NAMES[1]}\n{line}\n")  # the masks have no sub-folder of this name
        assert abs(levels(data)[1] - 60) < 3 and data[1]["mask"].shape == (48, 64) and data.names[1] == "sub/x"


def test_what_is_missing_is_named_by_line_and_told_in_20_lines(root):
    with pytest.raises(DataError) as caught:
        data_of(root, "".join(f"gone_{i}\n" for i in range(50)))
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 50 and len(lines) == 22 and "JPEGImages/gone_0.jpg" in lines[1]
    assert "... and 30 more; all of them are in " in lines[-1]
    listed = Path(lines[-1].split(" are in ")[1]).read_text(encoding="utf-8")
    assert "gone_49.jpg: not found (line 50 of val.txt)" in listed and listed.count("not found") == 50
    assert str(caught.value) == str(caught.value)  # written once


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"# nothing\n", b"\xef\xbb\xbf"])
def test_lists_of_nothing_are_named(root, content):
    with pytest.raises(DataError, match=r"val\.txt lists no images"):
        data_of(root, content)


def test_a_list_twice_names_the_lines(root):
    with pytest.raises(DataError, match=rf"1 names are listed twice\n  {NAMES[0]} \(lines 1, 3\)"):
        data_of(root, f"{NAMES[0]}\n{NAMES[1]}\nJPEGImages/{NAMES[0]}.jpg\n")


def test_a_root_or_a_list_that_is_not_there(root):
    with pytest.raises(DataError, match="lists there: train_aug, val"):
        list_file(root, "test")


# what breaks after the check, or without one


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_that_no_check_saw_is_named(root, workers):
    (root / "JPEGImages" / f"{NAMES[1]}.jpg").write_bytes(b"broken")
    data = TrainingSet(settings(root, check="off"), AugmentSettings(crop=32))
    with pytest.raises(DataError) as caught:
        for _, batch in zip(range(3), training_loader(data, 1, num_workers=workers)):
            assert batch["image"].isfinite().all()
    assert str(caught.value).endswith(f"{NAMES[1]}.jpg: cannot be decoded (it is a text)")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(root))


def test_an_absolute_folder_of_photographs_with_a_broken_one(root, tmp_path):
    (root / "JPEGImages").rename(tmp_path / "photos")
    (tmp_path / "photos" / f"{NAMES[1]}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{tmp_path}/photos/{NAMES[1]}\.jpg: cannot be decoded \(the file is empty\)"):
        data_of(root, "\n".join(NAMES), image_dir=str(tmp_path / "photos"))


def test_thin_photographs(root):
    for number, size in enumerate(((1, 400), (2, 2), (7, 300))):
        photo(root / "JPEGImages" / f"thin{number}.jpg", 50, size)
        photo(root / "SegmentationClassAug" / f"thin{number}.png", 3, size)
    data = data_of(root, "thin0\nthin1\nthin2\n")
    assert [tuple(data[i]["mask"].shape) for i in range(3)] == [(400, 1), (2, 2), (300, 7)]
    small = TrainingSet(settings(root), AugmentSettings(crop=16, scale=(0.5, 0.5), flip=0), "val")[1, 0]
    y0, y1, x0, x1 = small["img_box"].tolist()  # 2x2 at half its size is one pixel
    shown = small["image"][0, y0:y1, x0:x1] * 0.229 + 0.485
    assert shown.shape == (1, 1) and abs(float(shown) * 255 - 50) < 3


def test_a_photograph_over_the_limit_is_named(root):
    with pytest.raises(DataError, match=rf"JPEGImages/{NAMES[2]}\.jpg: 66x48 pixels, more than the limit"):
        data_of(root, "\n".join(NAMES), max_pixels=65 * 48)


def test_photographs_of_16_bits_in_a_data_set(root, capsys):
    forget_notices()
    grey = np.linspace(0, 65_535, 48 * 64).reshape(48, 64).astype(np.uint16)
    (root / "JPEGImages" / f"{NAMES[0]}.jpg").unlink()
    Image.fromarray(grey).save(root / "JPEGImages" / f"{NAMES[0]}.png")
    data = data_of(root, "\n".join(NAMES))
    assert torch.equal(data.read_photo(0)[0], torch.from_numpy(np.rint(grey / 257)).byte())
    assert "scaled from 0..65535 to 8 bits" in capsys.readouterr().err
    assert read_label(data.mask_path(0)).shape == (48, 64)
