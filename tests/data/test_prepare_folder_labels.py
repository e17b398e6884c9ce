"""`afa prepare folder`: where labels come from, and which classes there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.piles import BLUE, RED, labels_in, opened, photo

from afa_model.data.classes import class_names
from afa_model.data.prepare.folder import FolderSettings, prepare_folder
from afa_model.errors import ConfigError, DataError

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
