"""`afa prepare folder`: whatever lies in a folder becomes a data set that training opens, without any mask."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.tiny_run import tiny_args

from afa_model import cli
from afa_model.data.classes import class_names
from afa_model.data.datasets import DataSettings, TrainingSet
from afa_model.data.order import training_loader
from afa_model.data.prepare import folder as module
from afa_model.data.prepare.folder import FolderSettings, prepare_folder
from afa_model.data.prepare.photographs import free_name
from afa_model.data.prepare.split import validation_share
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import ConfigError, DataError
from afa_model.runtime.notices import forget_notices

RED, BLUE = (200, 40, 30), (30, 60, 210)


def photo(path: Path, color=RED, size=(40, 30), **how) -> Path:
    """A photograph whose left third is white, so that turns show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.paste((255, 255, 255), (0, 0, size[0] // 3, size[1]))
    image.save(path, **how)
    return path


@pytest.fixture
def pile(tmp_path):
    """Six photographs of each of two classes, in folders of their names; no two are the same."""
    for place, (name, color) in enumerate((("cat", RED), ("dog", BLUE))):
        for number in range(6):
            photo(tmp_path / "pile" / name / f"{name} {number}.jpg", color, (40 + number, 30 + place))
    return tmp_path / "pile"


def labels_in(root: Path) -> dict[str, list[str]]:
    return json.loads((root / "cls_labels.json").read_text())


def names_in(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


def opened(root: Path, **changes) -> TrainingSet:
    settings = DataSettings(root=str(root), num_workers=0, **changes)
    return TrainingSet(settings, AugmentSettings(crop=32))


# --- what comes out opens, loads and trains ---------------------------------------------------------------------------


def test_the_loader_takes_it_as_it_is(pile, tmp_path):
    made = prepare_folder(pile, tmp_path / "data")
    assert (made.train, made.val, made.added, made.refused) == (10, 2, 12, [])
    assert made.classes == {"cat": (5, 1), "dog": (5, 1)}
    assert not list((tmp_path / "data").glob("Segmentation*"))
    dataset = opened(tmp_path / "data")
    assert dataset.label_source == "file" and dataset.class_names == ("background", "cat", "dog")
    batch = next(iter(training_loader(dataset, 10, 0)))
    assert batch["image"].shape == (10, 3, 32, 32)
    for name, label in zip(batch["name"], batch["cls_labels"].tolist()):
        assert label == [float(name.startswith("cat/")), float(name.startswith("dog/"))]
    assert len(opened(tmp_path / "data", train_split="val")) == 2


def test_it_is_trained_on_by_root_alone_and_the_classifier_is_scored(pile, tmp_path, capsys):
    """Evaluation is due by default, and would need masks; masks that are laid there later are scored."""
    root = tmp_path / "data"
    assert cli.main(["prepare", "folder", str(pile), "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "cat  5 to train on, 1 to validate on" in printed and f"afa train --data.root {root}" in printed
    forget_notices()
    few = {"schedule__max_iters": 1, "schedule__warmup_iters": 0, "step__aff_iters": 0, "eval__every": 2_000}
    assert cli.main(["train", *tiny_args(root, tmp_path / "run", **few)]) == 0
    printed = capsys.readouterr().out
    assert f"{root} has no masks to score against" in printed and "on the 2 photographs of val" in printed
    assert "evaluation after step 1, classifier F1 " in printed
    (root / "SegmentationClassAug").mkdir()
    assert cli.main(["train", *tiny_args(root, tmp_path / "run2", **few)]) == 2
    assert "SegmentationClassAug" in capsys.readouterr().err


# --- labels -----------------------------------------------------------------------------------------------------------


def test_of_one_name_and_one_contents_a_photograph_is_one_with_both_labels(pile, tmp_path):
    for name in ("cat", "dog"):
        photo(pile / name / "both.jpg", (90, 90, 90))
        photo(pile / name / "other.jpg", RED if name == "cat" else BLUE)
    photo(pile / "dog" / "renamed.jpg", (90, 90, 90))
    prepare_folder(pile, tmp_path / "data")
    found = labels_in(tmp_path / "data")
    assert found["cat/both"] == ["cat", "dog"] and "dog/both" not in found
    assert found["cat/other"] == ["cat"] and found["dog/other"] == ["dog"] and found["dog/renamed"] == ["dog"]


def test_sub_folders_that_are_splits_or_none_are_refused(tmp_path):
    photo(tmp_path / "pile" / "train" / "a.jpg")
    photo(tmp_path / "pile" / "val" / "b.jpg")
    with pytest.raises(ConfigError, match=r"labels: the sub-folders .* \(train, val\) are called as splits"):
        prepare_folder(tmp_path / "pile", tmp_path / "data")
    with pytest.raises(ConfigError, match=r"labels: .* has no sub-folders whose names could be classes"):
        prepare_folder(tmp_path / "pile" / "train", tmp_path / "data")
    with pytest.raises(DataError, match=r"source: .* is not a folder"):
        prepare_folder(tmp_path / "nowhere", tmp_path / "data")


LABELLED = {"a": ["cat"], "sub/b": ["cat", "hot dog"], "c": ["hot dog"]}
VOC = "<annotation><filename>{}</filename>{}</annotation>"
LABELME = {"flags": {"cat": False}, "imagePath": "..\\x\\{}.jpg"}


def _coco() -> dict:
    kinds = {"hot dog": 7, "cat": 18}
    images = [{"id": place, "file_name": f"{name}.jpg"} for place, name in enumerate(LABELLED)]
    rows = [(place, kinds[label]) for place, labels in enumerate(LABELLED.values()) for label in labels]
    boxes = [{"id": number, "image_id": image, "category_id": kind} for number, (image, kind) in enumerate(rows)]
    categories = [{"id": key, "name": name} for name, key in reversed(kinds.items())]
    return {"images": images, "annotations": boxes, "categories": categories}


def _cvat() -> str:
    rows = [
        f'<image name="{name}.jpg"><tag label="{own[0]}"/>' + "".join(f'<box label="{x}"/>' for x in own) + "</image>"
        for name, own in LABELLED.items()
    ]
    return "<annotations><meta><label><name>bird</name></label></meta>" + "".join(rows) + "</annotations>"


FILES = {
    "plain.csv": "a.jpg,cat\nsub/b.jpg,cat;hot dog\nc.jpg,hot dog\n",
    "headed.csv": "\ufefffile,label\r\na,cat\r\nsub\\b.jpg,hot dog\r\nsub\\b.jpg,cat\r\nc,hot dog\r\n",
    "columns.csv": "whatever,cat,hot dog\na.jpg,1,0\nb.jpg,1,1\nc.jpg,0,1\n",
    "quoted.csv": 'filename,labels\na.jpg,"cat"\nsub/b.jpg,"cat,hot dog"\nc.jpg,hot dog\n',
    "tabs.tsv": "a.jpg\tcat\nb.jpg\tcat\thot dog\nc.jpg\thot dog\n",
    "dict.json": json.dumps({"a.jpg": ["cat"], "b": ["hot dog", "cat"], "./c.jpg": "hot dog"}),
    "list.json": json.dumps([{"file": f"{name}.jpg", "labels": own} for name, own in LABELLED.items()]),
    "coco.json": json.dumps(_coco()),
    "cvat.xml": _cvat(),
    "voc": {
        f"{name}.xml": VOC.format("IMG_1.jpg", "".join(f"<object><name>{x}</name></object>" for x in own))
        for name, own in LABELLED.items()
    },
    "labelme": {
        f"{name}.json": json.dumps(
            {**LABELME, "imagePath": f"..\\x\\{Path(name).name}.jpg", "shapes": [{"label": x} for x in own * 2]}
        )
        for name, own in LABELLED.items()
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_label_file_says_the_same(tmp_path, kind):
    for place, name in enumerate(LABELLED):
        photo(tmp_path / "pile" / f"{name}.jpg", size=(40, 30 + place))
    content = FILES[kind]
    for name, text in content.items() if isinstance(content, dict) else [("", content)]:
        path = tmp_path / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    settings = FolderSettings(labels=str(tmp_path / kind), val="0")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", settings)
    assert labels_in(tmp_path / "data") == {name: sorted(own) for name, own in LABELLED.items()} or kind == "coco.json"
    assert made.refused == [] and made.val == 0
    order = ("hot dog", "cat") if kind == "coco.json" else ("cat", "hot dog")  # COCO's ids say an order
    assert class_names(tmp_path / "data") == ("background", *order)
    expected = [[float(label in LABELLED[name]) for label in order] for name in sorted(LABELLED)]
    assert opened(tmp_path / "data").labels.tolist() == expected


def test_flags_of_labelme_and_their_shapes_count(tmp_path):
    photo(tmp_path / "a.jpg")
    content = {"imagePath": "a.jpg", "shapes": [], "flags": {"cat": True, "dog": False}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    prepare_folder(tmp_path, tmp_path / "data", FolderSettings(labels=str(tmp_path / "a.json"), val="0"))
    assert labels_in(tmp_path / "data") == {"a": ["cat"]}


def test_classes_in_masks_are_labels_and_the_masks_stay_where_they_are(tmp_path):
    masks = {"a": [0, 1], "b": [0, 255, 2], "c": [0]}
    for place, (name, values) in enumerate(masks.items()):
        photo(tmp_path / "pile" / f"{name}.jpg", size=(40, 30 + place))
        mask = Image.fromarray(np.resize(np.array(values, np.uint8), (30 + place, 40)))
        (tmp_path / "pile" / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "pile" / "masks" / f"{name}.png")
    photo(tmp_path / "pile" / "d.jpg", size=(50, 50))
    how = {"masks": str(tmp_path / "pile" / "masks"), "val": "0"}
    with pytest.raises(ValueError, match="masks: expected classes with them"):
        FolderSettings(**how)
    settings = FolderSettings(**how, classes="cat,dog")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", settings)
    assert labels_in(tmp_path / "data") == {"a": ["cat"], "b": ["dog"]}
    assert [line.split(":")[0] for line in made.refused] == ["d.jpg", "c.jpg"]
    assert {path.name for path in (tmp_path / "data").rglob("*.png")} == set()
    made = prepare_folder(tmp_path / "pile", tmp_path / "data2", FolderSettings(**how, classes="cat"))
    assert any("b.jpg" in line and "label 2 outside 0..1" in line for line in made.refused)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "x.csv cannot be read: it is empty"),
        ("x.csv", "a.jpg,0,1\nb.jpg,1,0\n", "line 1: numbers without a first line"),
        ("x.json", "[1]", 'entry 1: expected {"file": ..., "labels": [...]}'),
        ("x.json", '{"a": [1]}', "'a': expected a list of class names"),
        ("x.json", '{"a": ["x"], "a": ["y"]}', "'a' has two entries"),
        ("x.json", "{", "labels .*x.json cannot be read"),
        ("x.xml", "<a>", "not XML"),
        ("x.xml", "<annotations><track/></annotations>", "CVAT's annotation of a video"),
        ("x.xlsx", "", "ending '.xlsx', expected .csv"),
    ],
)
def test_label_files_that_cannot_be_used_are_named(tmp_path, name, text, message):
    photo(tmp_path / "pile" / "a.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message.replace("[", r"\[").replace("{", r"\{").replace("...", r"\.\.\.")):
        prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / name)))
    with pytest.raises(DataError, match=r"labels: .* not found"):
        prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "none.csv")))


def test_labels_of_no_photograph_or_of_several_are_listed(tmp_path):
    photo(tmp_path / "pile" / "x" / "a.jpg")
    photo(tmp_path / "pile" / "y" / "a.jpg", BLUE)
    photo(tmp_path / "pile" / "b.jpg", BLUE)
    (tmp_path / "l.csv").write_text("a.jpg,cat\nx/a.jpg,cat\nz.jpg,cat\n")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.csv"), val="0"))
    assert made.refused == [
        "l.csv: 'a.jpg': it may mean x/a.jpg, y/a.jpg",
        f"l.csv: 'z.jpg': no such photograph in {tmp_path / 'pile'}",
        "b.jpg: no label in l.csv",
        "y/a.jpg: no label in l.csv",
    ]
    assert (tmp_path / "data" / "refused.txt").read_text().splitlines() == made.refused


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,height,class,xmin,ymin\na.jpg,40,30,cat,1,2\na.jpg,40,30,hot dog,3,4\nb.jpg,40,30,cat,5,6\n",
        "id,file,label\n7,a.jpg,cat\n7,a.jpg,hot dog\n9,b.jpg,cat\n",
        "Label;Image\ncat;a.jpg\nhot dog;a.jpg\ncat;b.jpg\n",
        "image,cat,hot dog\na.jpg,1.0,1.0\nb.jpg,1.0,0.0\n",
        "image,cat,hot dog\na.jpg,True,True\nb.jpg,True,False\n",
        "image,label\na.jpg,cat,hot dog\nb.jpg,cat\n",
        '\ufefffile,label\r\n"a.jpg","cat|hot dog"\r\n\r\nb.jpg,cat\r\n',
        "image,label,score\na.jpg,cat;hot dog,0.5\nb.jpg,cat,1\n",
    ],
)
def test_columns_count_by_their_names(tmp_path, text):
    photo(tmp_path / "pile" / "a.jpg")
    photo(tmp_path / "pile" / "b.jpg", BLUE)
    (tmp_path / "l.csv").write_text(text, newline="")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.csv")))
    assert (made.refused, labels_in(tmp_path / "data")) == ([], {"a": ["cat", "hot dog"], "b": ["cat"]})
    assert class_names(tmp_path / "data") == ("background", "cat", "hot dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,cat,10,20\nb.jpg,cat,11,21\n", "column 3 holds numbers such as 10, which are no labels"),
        ("file,kind,width\na.jpg,cat,40\n", r"column 3 \(width\) holds numbers such as 40"),
        ("image,cat,dog\na.jpg,0.9,0.1\n", r"column 2 \(cat\) holds numbers such as 0\.9"),
        ("id,file,label\n7,a.jpg\n", "line 2: 2 cells, the first line names 3"),
    ],
)
def test_numbers_do_not_become_classes(tmp_path, text, message):
    photo(tmp_path / "pile" / "a.jpg")
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.csv")))


def test_labels_of_one_column_may_be_numbers(tmp_path):
    photo(tmp_path / "pile" / "a.jpg")
    photo(tmp_path / "pile" / "b.jpg", BLUE)
    (tmp_path / "l.csv").write_text("file,label\na.jpg,0\nb.jpg,1\n")
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.csv")))
    assert labels_in(tmp_path / "data") == {"a": ["0"], "b": ["1"]}


def test_several_labels_in_one_text_of_json_are_several(tmp_path):
    photo(tmp_path / "pile" / "a.jpg")
    (tmp_path / "l.json").write_text('{"a.jpg": "cat; dog"}')
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.json")))
    assert labels_in(tmp_path / "data") == {"a": ["cat", "dog"]}


def test_a_label_of_another_folder_is_nobody_elses(tmp_path):
    photo(tmp_path / "pile" / "cats" / "1.jpg")
    photo(tmp_path / "pile" / "cats" / "2.jpg", BLUE)
    table = "dogs/1.jpg,dog\nC:\\pile\\cats\\1.jpg,cat\n/home/x/cats/2,cat\n"
    (tmp_path / "l.csv").write_text(table)
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(labels=str(tmp_path / "l.csv")))
    assert labels_in(tmp_path / "data") == {"cats/1": ["cat"], "cats/2": ["cat"]}
    assert made.refused == [f"l.csv: 'dogs/1.jpg': no such photograph in {tmp_path / 'pile'}"]


def test_a_mask_that_two_photographs_may_mean_is_neithers(tmp_path):
    for name, color in (("cat", RED), ("dog", BLUE)):
        photo(tmp_path / "pile" / name / "1.jpg", color)
    photo(tmp_path / "pile" / "cat" / "2.jpg", (1, 2, 3))
    (tmp_path / "masks").mkdir()
    for name in "12":
        Image.fromarray(np.full((30, 40), 1, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    settings = FolderSettings(masks=str(tmp_path / "masks"), classes="cat,dog")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", settings)
    assert labels_in(tmp_path / "data") == {"cat/2": ["cat"]}
    mask = tmp_path / "masks" / "1.png"
    assert made.refused == [
        f"{name}/1.jpg: {mask} may be the mask of 2 photographs of this name" for name in ("cat", "dog")
    ]


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_in_the_order_asked_for_and_others_are_left_out(pile, tmp_path):
    photo(pile / "bird" / "b.jpg")
    made = prepare_folder(pile, tmp_path / "data", FolderSettings(classes="dog,cat"))
    assert class_names(tmp_path / "data") == ("background", "dog", "cat")
    assert made.refused == ["bird/b.jpg: bird not among the classes"]
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    prepare_folder(pile, tmp_path / "data2", FolderSettings(classes=str(tmp_path / "names.txt")))
    assert class_names(tmp_path / "data2") == ("background", "cat", "dog", "bird")
    for wrong, told in (("cat,cat", "'cat' is named twice"), ("cat,,dog", "an empty name")):
        with pytest.raises(ConfigError, match=f"classes: {told}"):
            prepare_folder(pile, tmp_path / "data3", FolderSettings(classes=wrong))


@pytest.mark.parametrize("names", [["0", "1"], ["1 apple", "2 apples"], ["room 1", "room 2"], ["x_y", "Ä ö"], ["only"]])
def test_names_of_any_kind_come_back_as_they_were(tmp_path, names):
    for place, name in enumerate(names):
        photo(tmp_path / "pile" / name / "x.jpg", size=(40, 30 + place))
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert class_names(tmp_path / "data") == ("background", *names)
    assert opened(tmp_path / "data").labels.sum() == len(names)


def test_a_name_that_no_class_can_have_is_refused(tmp_path):
    photo(tmp_path / "pile" / "cat" / "x.jpg")
    photo(tmp_path / "pile" / "ignore" / "y.jpg")
    with pytest.raises(DataError, match=r"classes: line 3: 'ignore' is no class(?s:.*)leave it out by --classes"):
        prepare_folder(tmp_path / "pile", tmp_path / "data")
    assert not (tmp_path / "data" / "JPEGImages").exists(), "told before the work"
    assert prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(classes="cat")).train == 1


# --- photographs ------------------------------------------------------------------------------------------------------


def test_photographs_of_every_kind_become_upright_jpegs(tmp_path):
    folder = tmp_path / "pile" / "cat"
    turn = Image.Exif()
    turn[0x112] = 6  # shown turned by 90 degrees: white at the top
    fine = photo(folder / "fine.JPG", quality=80)
    photo(folder / "turned.jpg", exif=turn)
    photo(folder / "p.png")
    Image.fromarray(np.array([[0, 65535], [32768, 65535]], np.uint16).repeat(9, 0)).save(folder / "deep.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "clear.webp", lossless=True)
    Image.new("CMYK", (20, 20)).save(folder / "print.jpeg")
    Image.new("P", (20, 20)).save(folder / "old.pcx")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert made.refused == [] and made.added == 7
    images = tmp_path / "data" / "JPEGImages" / "cat"
    assert (images / "fine.jpg").read_bytes() == fine.read_bytes(), "copied, byte for byte"
    with Image.open(images / "turned.jpg") as image:
        assert image.size == (30, 40) and not image.getexif()
        assert min(image.getpixel((15, 2))) > 240 and max(image.getpixel((15, 38))[1:]) < 90
    pixels = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in images.iterdir()}
    assert pixels["clear"].min() == 255, "transparent is white"
    assert pixels["deep"][0, 0].max() < 8 and abs(int(pixels["deep"][-1, 0, 0]) - 128) < 8
    assert {Image.open(path).format for path in images.iterdir()} == {"JPEG"}


def test_photographs_are_shrunk_if_asked(tmp_path):
    photo(tmp_path / "pile" / "cat" / "a.jpg", size=(90, 30))
    photo(tmp_path / "pile" / "cat" / "b.jpg", size=(40, 30))
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0", long_side=60))
    found = [Image.open(tmp_path / "data" / "JPEGImages" / "cat" / name).size for name in ("a.jpg", "b.jpg")]
    assert found == [(60, 20), (40, 30)]
    with pytest.raises(ConfigError, match=r"long_side: .* was prepared with 60, now None"):
        prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))


def test_of_large_photographs_a_line_says_what_a_crop_sees_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_LARGE", 30)
    photo(tmp_path / "pile" / "cat" / "a.jpg")
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert "half of the photographs have a side of 40 pixels or more" in capsys.readouterr().err


def test_what_cannot_be_taken_is_told_and_ends_nothing(pile, tmp_path, capsys):
    (pile / "cat" / "broken.jpg").write_bytes(b"<html>")
    (pile / "cat" / "cut.jpg").write_bytes((pile / "cat" / "cat 0.jpg").read_bytes()[:400])
    (pile / "cat" / "film.mov").write_bytes(b"film")
    (pile / "cat" / ".hidden.jpg").write_bytes(b"")
    (pile / "cat" / "notes.txt").write_text("mine")
    photo(pile / "loose.jpg")
    assert cli.main(["prepare", "folder", str(pile), "--root", str(tmp_path / "data")]) == 0
    shown = capsys.readouterr()
    told = (tmp_path / "data" / "refused.txt").read_text().splitlines()
    assert len(told) == 4 and f"4 refused (also in {tmp_path / 'data' / 'refused.txt'})" in shown.err
    assert all(line in shown.err for line in told)
    assert [line.split(":")[0] for line in told] == ["cat/film.mov", "loose.jpg", "cat/broken.jpg", "cat/cut.jpg"]
    assert len(opened(tmp_path / "data")) == 10
    assert cli.main(["prepare", "folder", str(pile / "cat"), "--root", str(tmp_path / "d")]) == 2
    for path in (pile / "cat").glob("cat*"):
        path.unlink()
    (pile / "loose.jpg").unlink()
    (tmp_path / "only").mkdir()
    (pile / "cat").rename(tmp_path / "only" / "cat")
    with pytest.raises(DataError, match="source: no photograph can be taken"):
        prepare_folder(tmp_path / "only", tmp_path / "d2")


def test_a_phones_own_format_is_read_where_its_package_is(tmp_path, monkeypatch):
    photo(tmp_path / "pile" / "cat" / "a.jpg")
    (tmp_path / "pile" / "cat" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert made.train == 1
    (told,) = made.refused
    assert told.startswith("cat/b.heic: cannot be decoded") and told.endswith("pip install pillow-heif")
    called = []
    package = types.SimpleNamespace(register_heif_opener=lambda: called.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert called


def test_names_hold_nothing_that_a_list_could_misread():
    taken: set[str] = set()
    for inside, expected in (
        ("cat/IMG 1 (2).jpg", "cat/IMG_1_(2)"),
        ("cat/Img_1_(2).png", "cat/Img_1_(2)_2"),
        ("# a,b;c.jpg.png", "_a_b_c_jpg"),
        ("Cafe\u0301.jpg", "Caf\u00e9"),
    ):
        name = free_name(module.Path(inside), taken)
        assert name == expected
        taken.add(name.casefold())


# --- running again ----------------------------------------------------------------------------------------------------


def state(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*.jpg")}


def test_new_photographs_are_added_and_nothing_else_moves(pile, tmp_path):
    root = tmp_path / "data"
    prepare_folder(pile, root, FolderSettings(val="0.34"))
    images, val = state(root), names_in(root, "val")
    assert len(val) == 4
    for number in range(3):
        photo(pile / "ape" / f"ape{number}.jpg", (9, 9, 9), (50, 30 + number))
    made = prepare_folder(pile, root)
    assert (made.added, made.train + made.val) == (3, 15)
    assert class_names(root) == ("background", "cat", "dog", "ape"), "numbers that a model knows stay"
    assert set(val) <= set(names_in(root, "val")) and len(names_in(root, "val")) == 5
    assert state(root).items() >= images.items()
    # From another folder, one of them under a name that is there: a photograph of its own.
    photo(tmp_path / "more" / "cat" / "cat 0.jpg", (1, 2, 3))
    made = prepare_folder(tmp_path / "more", root)
    assert (made.added, made.train + made.val) == (1, 16)
    assert labels_in(root)["cat/cat_0_2"] == ["cat"] and len(opened(root)) == made.train
    with pytest.raises(ConfigError, match=r"classes: .* has cat, dog, ape"):
        prepare_folder(pile, root, FolderSettings(classes="dog,cat"))


def test_a_photograph_that_changed_or_moved_is_followed(pile, tmp_path):
    root = tmp_path / "data"
    prepare_folder(pile, root, FolderSettings(val="0"))
    photo(pile / "cat" / "cat 0.jpg", (0, 250, 0), (44, 33))
    (pile / "cat" / "cat 1.jpg").rename(pile / "dog" / "cat 1.jpg")
    made = prepare_folder(pile, root)
    assert (made.added, made.train) == (1, 12)
    assert Image.open(root / "JPEGImages" / "cat" / "cat_0.jpg").size == (44, 33)
    assert labels_in(root)["cat/cat_1"] == ["dog"]


def test_what_was_one_photograph_and_is_two_now_is_two(pile, tmp_path):
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        photo(pile / name / "both.jpg", (90, 90, 90))
    prepare_folder(pile, root, FolderSettings(val="0"))
    photo(pile / "cat" / "both.jpg", (1, 1, 90))
    made = prepare_folder(pile, root)
    found = labels_in(root)
    assert made.train == 14 and sorted(own for name, own in found.items() if "both" in name) == [["cat"], ["dog"]]
    assert len(state(root)) == 14


def test_a_run_that_was_stopped_goes_on(pile, tmp_path, monkeypatch):
    root, calls = tmp_path / "data", []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(*arguments)

    copy = module.copy_photograph
    monkeypatch.setattr(module, "copy_photograph", stopping)
    monkeypatch.setattr(module, "in_threads", lambda work, items, title: [work(item) for item in items])
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(pile, root)
    there = state(root)
    assert len(there) == 3 and not (root / "ImageSets").exists()
    made = prepare_folder(pile, root)
    assert made.added == 9 and state(root).items() >= there.items() and len(opened(root)) == 10


def test_a_folder_of_something_else_is_left_alone(pile, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"root: .* holds thesis.tex and no prepare.json"):
        prepare_folder(pile, root)
    assert os.listdir(root) == ["thesis.tex"]
    for place in (pile, pile.parent):
        with pytest.raises(ConfigError, match=r"root: .* holds the photographs themselves"):
            prepare_folder(pile, place)
    made = prepare_folder(pile, pile / "prepared")  # inside it may be
    assert prepare_folder(pile, pile / "prepared").train == made.train
    (pile / "prepared" / "prepare.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"root: .*prepare.json cannot be read"):
        prepare_folder(pile, pile / "prepared")


def test_labels_of_before_stay_where_a_new_file_says_nothing_and_go_where_it_says_none(pile, tmp_path):
    root = tmp_path / "data"
    prepare_folder(pile, root, FolderSettings(val="0"))
    photo(pile / "new.jpg", (7, 7, 7))
    (tmp_path / "new.csv").write_text("new.jpg,dog\ncat 0.jpg,\n")
    made = prepare_folder(pile, root, FolderSettings(labels=str(tmp_path / "new.csv")))
    assert made.train == 12 and made.refused == ["cat/cat 0.jpg: it shows no class (taken with --allow_empty)"]
    assert labels_in(root)["new"] == ["dog"] and "cat/cat_0" not in labels_in(root)
    assert not (root / "JPEGImages" / "cat" / "cat_0.jpg").exists()
    made = prepare_folder(pile, root, FolderSettings(labels=str(tmp_path / "new.csv"), allow_empty=True))
    assert labels_in(root)["cat/cat_0"] == [] and len(opened(root, allow_empty=True)) == 13


def test_two_piles_that_have_a_photograph_both_say_what_it_shows(tmp_path):
    for pile, name in (("one", "cat"), ("two", "dog")):
        photo(tmp_path / pile / name / "same.jpg", (9, 9, 9))
        photo(tmp_path / pile / name / f"{name}.jpg", RED if name == "cat" else BLUE)
        prepare_folder(tmp_path / pile, tmp_path / "data", FolderSettings(val="0"))
    assert labels_in(tmp_path / "data")["cat/same"] == ["cat", "dog"] and len(labels_in(tmp_path / "data")) == 3
    prepare_folder(tmp_path / "one", tmp_path / "data")
    assert labels_in(tmp_path / "data")["cat/same"] == ["cat", "dog"]


def test_folders_behind_links_are_looked_into(tmp_path):
    photo(tmp_path / "far" / "1.jpg")
    photo(tmp_path / "pile" / "dog" / "2.jpg", BLUE)
    (tmp_path / "pile" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "pile" / "dog" / "again").symlink_to(tmp_path / "pile")
    (tmp_path / "pile" / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert labels_in(tmp_path / "data") == {"cat/1": ["cat"], "dog/2": ["dog"]}
    assert made.refused == ["dog/gone.jpg: a link to what is not there"]


def test_names_as_long_as_a_file_system_takes_them(tmp_path):
    for number in range(2):
        photo(tmp_path / "pile" / "cat" / ("ü" * 120 + f"{number}.jpg"), (number, 0, 0))
    made = prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(val="0"))
    assert made.train == 2 and list(labels_in(tmp_path / "data")) == ["cat/" + "ü" * 100, "cat/" + "ü" * 100 + "_2"]
    assert len(opened(tmp_path / "data")) == 2


@pytest.mark.parametrize("name", ["Background", "bg", "__background__", "__ignore__"])
def test_folders_of_no_class(tmp_path, name):
    photo(tmp_path / "pile" / name / "1.jpg")
    photo(tmp_path / "pile" / "cat" / "2.jpg", BLUE)
    prepare_folder(tmp_path / "pile", tmp_path / "data", FolderSettings(allow_empty=True, val="0"))
    assert sorted(labels_in(tmp_path / "data").values()) == [[], ["cat"]]
    assert class_names(tmp_path / "data") == ("background", "cat")


# --- the split --------------------------------------------------------------------------------------------------------


def test_the_split_takes_of_each_class_and_is_the_same_everywhere():
    labels = {f"c{i}": ["common"] for i in range(40)} | {f"r{i}": ["rare"] for i in range(3)} | {"one": ["single"]}
    labels["both"] = ["common", "single"]
    chosen = validation_share(labels, 0.1, 0, {})
    shown = [label for name in chosen for label in labels[name]]
    assert (shown.count("common"), shown.count("rare"), shown.count("single")) == (4, 1, 1)
    assert validation_share(dict(reversed(labels.items())), 0.1, 0, {}) == chosen
    assert validation_share(labels, 0.1, 1, {}) != chosen
    more = labels | {f"d{i}": ["common"] for i in range(20)}
    for seed in range(5):
        again = validation_share(more, 0.1, seed, {name: name in chosen for name in labels})
        assert chosen <= again and len(again) == len(chosen) + 2 and not (again - chosen) & set(labels)
        assert validation_share({"a": ["x", "y"], "b": ["x"]}, 0.5, seed, {}) == {"b"}, "y would have none to train on"
    everything = validation_share({"a": ["x"], "b": ["x"], "c": ["y"]}, 0.99, 0, {})
    assert len(everything) == 1 and "c" not in everything, "of no class all photographs"
    assert validation_share(labels, 0, 0, {}) == set()


def test_a_list_says_what_is_for_validation(pile, tmp_path):
    (tmp_path / "val.txt").write_text("cat/cat 1.jpg\ndog 2\n")
    prepare_folder(pile, tmp_path / "data", FolderSettings(val=str(tmp_path / "val.txt")))
    assert names_in(tmp_path / "data", "val") == ["cat/cat_1", "dog/dog_2"]
    (tmp_path / "val.txt").write_text("cat 1\ncat 9.jpg\n")
    with pytest.raises(DataError, match=r"val: (?s:.*)line 2: 'cat 9.jpg': no such photograph"):
        prepare_folder(pile, tmp_path / "data", FolderSettings(val=str(tmp_path / "val.txt")))
    for wrong in ("1.0", "-0.1", "nowhere.txt"):
        with pytest.raises(ValueError, match="val: expected a share"):
            FolderSettings(val=wrong)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "usage: afa prepare folder SOURCE --root DIR"),
        (["photos"], "afa prepare: error: no data set 'photos' (there are folder, voc, sbd, coco)"),
        (["folder", "x"], "afa prepare folder: error: --root is required"),
        (["folder", "x", "--root", "y", "--val", "2"], "afa prepare folder: error: val: expected a share"),
        (["folder", "x", "--root", "y", "--lables", "z"], "afa prepare folder: error: lables: unknown setting (did"),
    ],
)
def test_mistakes_are_one_line(capsys, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *line]) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_class_keeps_its_share_of_validation_when_a_photograph_cannot_be_read(pile, tmp_path, monkeypatch, stopped):
    whole = prepare_folder(pile, tmp_path / "whole")
    assert whole.classes == {"cat": (5, 1), "dog": (5, 1)}
    for name in names_in(tmp_path / "whole", "val"):  # those that were chosen
        (pile / f"{name.replace('_', ' ')}.jpg").write_bytes(b"")
    if stopped:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_copy", lambda *arguments: exec("raise KeyboardInterrupt"))
            with pytest.raises(KeyboardInterrupt):
                prepare_folder(pile, tmp_path / "data")
    made = prepare_folder(pile, tmp_path / "data")
    assert made.classes == {"cat": (4, 1), "dog": (4, 1)} and len(made.refused) == 2
    again = prepare_folder(pile, tmp_path / "data", FolderSettings(val="0.5"))
    assert again.classes == {"cat": (2, 3), "dog": (2, 3)}, "another share is another split"
