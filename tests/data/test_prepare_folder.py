"""`afa prepare folder`: whatever lies in a folder becomes a data set that training opens, without any mask."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.piles import names_in, opened, photo
from support.tiny_run import tiny_args

from afa_model import cli
from afa_model.data.order import training_loader
from afa_model.data.prepare import folder as module
from afa_model.data.prepare.folder import FolderSettings, prepare_folder
from afa_model.data.prepare.photographs import free_name
from afa_model.data.prepare.split import validation_share
from afa_model.errors import ConfigError, DataError
from afa_model.runtime.notices import forget_notices

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
