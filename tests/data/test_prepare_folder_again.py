"""`afa prepare folder` on a folder that it has made before: what is added, what moves, what stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.piles import BLUE, RED, labels_in, names_in, opened, photo

from afa_model.data.classes import class_names
from afa_model.data.prepare import folder as module
from afa_model.data.prepare.folder import FolderSettings, prepare_folder
from afa_model.errors import ConfigError

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
