"""docs/data.md: its examples of files mean what is said of them, its commands exist, and what is printed is printed."""

from __future__ import annotations

import contextlib
import re

import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.common import ROOT
from support.phone_pile import make_pile

from afa_model import cli
from afa_model.data.class_file import read_class_file
from afa_model.data.label_file import LabelFile
from afa_model.data.lists import entries_of, list_lines
from afa_model.data.prepare.annotations import read_annotations
from afa_model.errors import DataError

TEXT = (ROOT / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"^<!-- (\w+): ([^\n]*) -->\n```\n(.*?)^```$", TEXT, re.S | re.M)
COMMANDS = [line.strip() for line in re.findall(r"^    (?:\$ )?(afa (?!.*error:).*)$", TEXT, re.M)]


def of_kind(kind: str) -> list[tuple[str, str]]:
    return [(said, content) for what, said, content in EXAMPLES if what == kind]


def test_there_are_examples_of_all_kinds():
    assert [len(of_kind(kind)) for kind in ("classes", "list", "labels")] == [5, 2, 4] and len(COMMANDS) >= 10


@pytest.mark.parametrize(("said", "content"), of_kind("classes"))
def test_class_files(said, content, tmp_path):
    (tmp_path / "classes.txt").write_text(content)
    if said.startswith("error "):
        with pytest.raises(DataError) as error:
            read_class_file(tmp_path / "classes.txt")
        assert str(error.value) == f"{tmp_path / 'classes.txt'}: {said.removeprefix('error ')}"
    else:
        assert ", ".join(read_class_file(tmp_path / "classes.txt")) == said


@pytest.mark.parametrize(("said", "content"), of_kind("list"))
def test_lists(said, content, tmp_path):
    for name in ("a.jpg", "sub/b.png", "c 1.jpg"):
        path = tmp_path / "JPEGImages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
        mask = (tmp_path / "SegmentationClassAug" / name).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(mask)
    path = tmp_path / "list.txt"
    path.write_text(content)
    entries = entries_of(path, list_lines(path), tmp_path, "JPEGImages", "SegmentationClassAug")
    assert ", ".join(entry.name for entry in entries) == said and all(entry.photo for entry in entries)
    if "SegmentationClassAug" in content:
        assert all(entry.mask.is_file() for entry in entries)


@pytest.mark.parametrize(("said", "content"), of_kind("labels"))
def test_label_files(said, content, tmp_path):
    path = tmp_path / f"labels{said.split()[0]}"
    path.write_text(content)
    table = LabelFile(path, ("background", "cat", "hot dog"))
    assert table["a"].tolist() == [1, 0] and table["b"].tolist() == [1, 1]
    if "of training" not in said:
        found = read_annotations(path).labels
        assert {key.removesuffix(".jpg"): own for key, own in found.items()} == {"a": ["cat"], "b": ["cat", "hot dog"]}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_are_there(line, capsys):
    words = line.split("#")[0].split()[1:]
    if words[0] not in cli.COMMANDS:
        pytest.skip(f"no command {words[0]} here")
    part = 2 if words[0] in cli.SUBCOMMANDS else 1
    assert part == 1 or words[1] in cli.SUBCOMMANDS[words[0]]
    helps = [[*words[:part], "--help"], *([["train", "--help"]] if words[:2] == ["bench", "data"] else [])]
    for help_line in helps:
        with contextlib.suppress(SystemExit):
            cli.main(help_line)
    printed = capsys.readouterr().out.replace("_", "-")
    for word in words:
        assert not word.startswith("--") or f"{word.replace('_', '-')} " in printed, word


def test_what_prepare_prints_is_what_is_shown(tmp_path, monkeypatch, capsys):
    make_pile(tmp_path / "phone")
    monkeypatch.chdir(tmp_path)
    line = "afa prepare folder phone --root data"
    assert cli.main(line.split()[1:]) == 0
    said = capsys.readouterr()
    shown = re.search(rf"^    \$ {line}\n((?:    .*\n)+)", TEXT, re.M)[1]
    assert [row[4:] for row in shown.splitlines()] == (said.err + said.out).splitlines()


def test_what_is_printed_offline_is_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "afa prepare voc --root VOC2012 --offline"
    assert cli.main(line.split()[1:]) == 2
    shown = re.search(rf"^    \$ {line}\n((?:    .*\n)+)", TEXT, re.M)[1]
    assert [row[4:] for row in shown.splitlines()] == capsys.readouterr().err.splitlines()
