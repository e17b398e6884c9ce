"""Label files and annotations in the formats in which people keep them; what is no label is named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from support.voc_factory import make_voc, write_xml

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label, write_label
from afa_model.data.image_labels import labels_from_xml
from afa_model.data.label_file import LabelFile
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError
from afa_model.runtime.notices import forget_notices

NAMES = ("background", "cat", "hot dog", "bus")
TRUTH = {"a": [1, 0, 0], "b": [0, 1, 1], "c d": [0, 0, 1]}
LISTS = {key: [NAMES[i + 1] for i in range(3) if row[i]] for key, row in TRUTH.items()}


def numbers(kind):
    return {key: kind(row) for key, row in TRUTH.items()}


def save_npz(path, arrays):
    np.savez(path, **arrays)


WRITERS = {
    "lists.json": lambda path: path.write_text(json.dumps(LISTS)),
    "one name.json": lambda path: path.write_text(json.dumps({**LISTS, "a": "cat", "b": "hot dog;bus"})),
    "by name.json": lambda path: path.write_text(
        json.dumps({key: dict(zip(NAMES[1:], row)) for key, row in TRUTH.items()})
    ),
    "utf-16.json": lambda path: path.write_text(json.dumps(LISTS), encoding="utf-16"),
    "files.json": lambda path: path.write_text(
        json.dumps({f"JPEGImages/{key}.jpg": row for key, row in TRUTH.items()})
    ),
    "x.npy": lambda path: np.save(path, numbers(np.array)),
    "x.npz": lambda path: save_npz(path, numbers(np.array)),
    "two arrays.npz": lambda path: save_npz(path, {"names": list(TRUTH), "labels": list(TRUTH.values())}),
    "x.pkl": lambda path: path.write_bytes(pickle.dumps(numbers(lambda row: np.array(row, np.uint8)))),
    "lists.pickle": lambda path: path.write_bytes(pickle.dumps(LISTS, protocol=0)),
    "x.pt": lambda path: torch.save(numbers(torch.tensor), path),
    "lists.pth": lambda path: torch.save(LISTS, path),
    "lists.csv": lambda path: path.write_text("a,cat\nb,hot dog;bus\nc d,bus\n"),
    "head.csv": lambda path: path.write_bytes(
        b"\xef\xbb\xbffile,label\r\na.jpg,cat\r\nb.jpg,hot dog|bus\r\nc d.jpg,bus\r\n"
    ),
    "columns of names.csv": lambda path: path.write_text("a,cat\nb,hot dog,bus\nc d,bus\n"),
    "a line for each.csv": lambda path: path.write_text("a,cat\nb,hot dog\nb,bus\nc d,bus\n"),
    "onehot.csv": lambda path: path.write_text("image,bus,cat,hot dog\na,0,1,0\nb,1,0,1\nc d,1,0,0\n"),
    "with background.csv": lambda path: path.write_text(
        "name,background,cat,hot dog,bus\na,1,1,0,0\nb,1,0,1,1\nc d,0,0,0,1\n"
    ),
    "numbers.csv": lambda path: path.write_text("a,1,0,0\nb,0,1,1\n\"c d\",0,0,1\n"),
    "tabs.tsv": lambda path: path.write_text("a\tcat\nb\thot dog,bus\nc d\tbus\n"),
    "semicolons.csv": lambda path: path.write_text("a;cat\nb;hot dog;bus\nc d;bus\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_kinds_of_files(tmp_path, kind):
    WRITERS[kind](path := tmp_path / kind)
    table = LabelFile(path, NAMES)
    assert {key: table[key].tolist() for key in TRUTH} == TRUTH
    assert table["a"].dtype == torch.float32 and "a" in table and "z" not in table


@pytest.mark.parametrize(
    "head",
    ["ImageID", "img_name", "Image Name", "filenames", "photo", "#image", "img_path", "uid", "Unnamed: 0", "image", ""],
)
def test_a_header_is_one_whatever_its_first_cell_says(tmp_path, head):
    """Columns in another order than the classes: by position every label would be another class's."""
    for mark in ",\t;":
        rows = [[head, "BUS", "cat", "Hot Dog"], *([key, row[2], row[0], row[1]] for key, row in TRUTH.items())]
        (tmp_path / "x.csv").write_text("\n".join(mark.join(map(str, row)) for row in rows))
        table = LabelFile(tmp_path / "x.csv", NAMES)
        assert {key: table[key].tolist() for key in TRUTH} == TRUTH, mark


def test_one_class_and_classes_that_are_digits(tmp_path):
    (tmp_path / "x.csv").write_text("photo,found\na,1\nb,0\n")
    table = LabelFile(tmp_path / "x.csv", ("background", "cat"))
    assert table["a"].tolist() == [1] and table["b"].tolist() == [0]
    (tmp_path / "x.csv").write_text("photo,8,7\na,1,0\nb,0,1\n")
    table = LabelFile(tmp_path / "x.csv", ("background", "7", "8"))
    assert table["a"].tolist() == [0, 1] and table["b"].tolist() == [1, 0]


class Runs:
    def __reduce__(self):
        return (pytest.fail, ("the label file ran code",))


@pytest.mark.parametrize("name", ["x.pkl", "x.npy", "x.npz", "x.pt"])
def test_no_file_runs_code(tmp_path, name):
    path = tmp_path / name
    content = {"a": Runs()}
    if name == "x.pkl":
        path.write_bytes(pickle.dumps(content))
    elif name == "x.pt":
        torch.save(content, path)
    else:
        (np.save if name == "x.npy" else np.savez)(path, np.array(content, dtype=object))
    with pytest.raises(DataError, match=rf"label_file .*{name} cannot be read") as caught:
        LabelFile(path, NAMES)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    if name == "x.pt":
        assert "it holds more than data (_pytest.outcomes" in str(caught.value)
    if name in ("x.pkl", "x.pt"):
        assert "save {image: [class names]} as .json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "image,cat,dog\na,1,0\n", "line 1: column 'dog' is no class"),
        ("x.csv", "image,cat,bus\na,1,0\n", "line 1: no column for 'hot dog'"),
        ("x.csv", "image,cat,hot dog,bus\na,1,0\n", "line 2: 2 columns, the first line names 3"),
        ("x.csv", "image,cat,hot dog,bus\na,1,0,x\n", "line 2: expected 0 or 1, got 'x'"),
        ("x.csv", "image,cat,hot dog,bus\na,1,0,1\na,1,0,0\n", "line 3: 'a' has a line already"),
        ("x.csv", "photo,cat,dog,bus\na,1,0,1\n", "line 1: column 'dog' is no class"),
        ("x.csv", "photo,cat,cat,bus\na,1,0,1\n", "line 1: two columns for 'cat'"),
        ("x.csv", "photo,l1,l2,l3\na,1,0,1\n", "line 1: column 'l1' is no class"),
        ("x.csv", ",image,cat,hot dog,bus\n0,a,1,0,1\n", "line 1: column 'image' is no class"),
        ("x.csv", "label,image\ncat,a\nbus,b\n", r"columns swapped\? 'cat' is a class; the image comes first"),
        ("x.csv", "", "it is empty"),
        ("x.json", '{"a": ["cat"], "b": [], "a": ["bus"]}', "'a' has two entries"),
        ("x.json", "[1]", "expected a dict of labels by name, got list"),
        ("x.json", "{", "cannot be read"),
        ("x.doc", "", r"ending '\.doc', expected \.npy"),
    ],
)
def test_what_is_no_label_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        LabelFile(tmp_path / name, NAMES)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([0, 2, 0], "expected 3 numbers of 0 or 1 in x.json, got 2 for hot dog"),
        ([0, 0.5, 0], "got 0.5 for hot dog"),
        ([1, 0, 0, 0], r"expected 3 numbers of 0 or 1 in x.json, got 4 \(the background has none\)"),
        ([1, 0], "got 2$"),
        (["cow"], "unknown class 'cow'"),
        ("cow", "unknown class 'cow'"),
        ({"cow": 1}, "unknown class 'cow'"),
        ({"CAT": 0, "hot dog": 0, "bus": 0}, "unknown class 'CAT'"),
        (None, r"null in x\.json; for no class write \[\]"),
        ({"cat": 3}, "expected 0 or 1 in x.json, got 3"),
        ([["a"], 2], "neither numbers nor class names"),
    ],
)
def test_what_is_no_label_is_named(tmp_path, entry, words):
    (tmp_path / "x.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(ValueError, match=words):
        LabelFile(tmp_path / "x.json", NAMES)["a"]


def test_of_two_files_of_one_name_each_has_its_own_label(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"p/x.jpg": ["cat"], "q/x.jpg": ["bus"]}))
    table = LabelFile(tmp_path / "x.json", NAMES)
    assert table["p/x"].tolist() == [1, 0, 0] and table["q/x"].tolist() == [0, 0, 1] and "x" not in table


def test_an_entry_of_another_folder_is_nobody_elses(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"/data/cats/1.jpg": ["cat"], "2.jpg": ["bus"]}))
    table = LabelFile(tmp_path / "x.json", NAMES)
    assert table["cats/1"].tolist() == [1, 0, 0] and table["any/2"].tolist() == [0, 0, 1] and "1" in table
    assert "dogs/1" not in table and "cats/dogs/1" not in table


# in a data set


def settings(root, **changes) -> DataSettings:
    return DataSettings(root=str(root), num_workers=0, **changes)


@pytest.mark.parametrize("given", [None, "cls_labels.json"])
@pytest.mark.parametrize("source", ["auto", "file"])
def test_a_label_file_of_the_training_images_leaves_evaluation_to_the_masks(tmp_path, capsys, given, source):
    forget_notices()
    names = make_voc(tmp_path, count=3)
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text(names[0])
    (lists / "val.txt").write_text("\n".join(names))
    (tmp_path / "cls_labels.json").write_text(json.dumps({names[0]: ["dog"]}))
    own = settings(tmp_path, label_file=given, label_source=source)
    assert TrainingSet(own, AugmentSettings(crop=32)).labels[0].nonzero().tolist() == [[11]]
    data = EvaluationSet(own)
    assert data.labels[1:].sum(1).tolist() == [2, 1]
    said = "2 of 3 images of val have no label in" in capsys.readouterr().err
    assert said == (data.label_source == "file") and (data.labels[0, 11] == 1) == said


def test_annotations_of_the_training_images_do_too(tmp_path):
    names = make_voc(tmp_path, count=3)
    write_xml(tmp_path, names[0], ["dog"])
    data = EvaluationSet(settings(tmp_path, label_source="xml"))
    assert data.labels[0].nonzero().tolist() == [[11]] and data.labels[1:].sum(1).tolist() == [2, 1]
    with pytest.raises(DataError, match=rf"Annotations/{names[1]}\.xml: not found"):
        TrainingSet(settings(tmp_path, label_source="xml"))


def test_classes_in_annotations_can_be_left_out(tmp_path):
    names = make_voc(tmp_path, count=1, xml=True)
    write_xml(tmp_path, names[0], ["cat", "unicorn"])
    with pytest.raises(DataError, match=r"unknown class 'unicorn' \(data\.xml_skip: \[unicorn\]"):
        TrainingSet(settings(tmp_path, label_source="xml"))
    data = TrainingSet(settings(tmp_path, label_source="xml", xml_skip=("unicorn",)))
    assert data.labels[0].nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ('<?xml version="1.0" encoding="utf-8"?>', "utf-8"),
        ('<?xml version="1.0" encoding="utf-16"?>', "utf-16"),
        ('<?xml version="1.0" encoding="utf-16"?>', "utf-8"),
        ('<?xml version="1.0" encoding="gbk"?>', "gbk"),
        ('<?xml version="1.0" encoding="latin-1"?>', "latin-1"),
        ('<?xml version="1.0" encoding="unheard-of"?>', "utf-8"),
        ("", "cp1252"),
    ],
)
def test_annotations_in_any_encoding(tmp_path, head, encoding):
    name = "château" if encoding != "gbk" else "照片"
    text = f"{head}<annotation><object><name> {name}\n</name></object></annotation>"
    (tmp_path / "x.xml").write_bytes(text.encode(encoding))
    assert labels_from_xml(tmp_path / "x.xml", ("background", "cat", name)).tolist() == [0, 1]


def test_annotations_with_a_namespace_and_without_a_name(tmp_path):
    text = '<annotation xmlns="urn:x"><object><name>cat</name></object></annotation>'
    (tmp_path / "x.xml").write_text(text)
    assert labels_from_xml(tmp_path / "x.xml", NAMES).tolist() == [1, 0, 0]
    (tmp_path / "x.xml").write_text("<annotation><object><part><name>cat</name></part></object></annotation>")
    with pytest.raises(ValueError, match="unknown class ''"):
        labels_from_xml(tmp_path / "x.xml", NAMES)
    (tmp_path / "x.xml").write_text("")
    with pytest.raises(ValueError, match="not XML"):
        labels_from_xml(tmp_path / "x.xml", NAMES)


def test_an_image_of_no_class_names_the_setting(tmp_path):
    make_voc(tmp_path, count=2)
    path = tmp_path / "SegmentationClassAug" / "2007_000000.png"
    write_label(path, torch.zeros_like(read_label(path)))
    with pytest.raises(DataError, match=r"empty annotation: no class but background \(with data\.allow_empty"):
        TrainingSet(settings(tmp_path))
    data = TrainingSet(settings(tmp_path, allow_empty=True))
    assert data.labels.sum(1).tolist() == [0, 2] and data.class_names == VOC_CLASSES


def test_no_masks_to_evaluate_with_names_the_setting(tmp_path):
    make_voc(tmp_path, count=1)
    (tmp_path / "SegmentationClassAug").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"evaluation needs masks.*--eval\.every 0"):
        EvaluationSet(settings(tmp_path))
