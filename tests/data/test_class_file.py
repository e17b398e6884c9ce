"""`classes.txt` as tools write it: every name at its own index, or an error that names the line."""

from __future__ import annotations

import codecs

import pytest

from afa_model.data.classes import VOC_CLASSES, class_names
from afa_model.errors import DataError

OBJECTS = VOC_CLASSES[1:]


def names_of(tmp_path, content: str | bytes, num_classes: int | None = None) -> tuple[str, ...]:
    (tmp_path / "classes.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    return class_names(tmp_path, num_classes)


@pytest.mark.parametrize(
    "first",
    ["background", "__background__", "_background_", "bg", "BG", "Background", "BACKGROUND", "<background>", "# a\nbkg",
     "__ignore__\n_background_", "__ignore__", "_ignore_\nbackground"],
)  # fmt: skip
def test_a_background_by_another_name_is_the_background(tmp_path, first):
    assert names_of(tmp_path, "\n".join([first, *OBJECTS])) == VOC_CLASSES


@pytest.mark.parametrize("pattern", ["{} {}", "{}: {}", "{}:{}", "{},{}", "{}\t{}", "{}. {}", "{} - {}", "{}) {}"])
@pytest.mark.parametrize("start", [0, 1])
def test_numbers_before_the_names_are_left_out(tmp_path, pattern, start):
    lines = [pattern.format(number, name) for number, name in enumerate(VOC_CLASSES)]
    assert names_of(tmp_path, "\r\n".join(lines[start:])) == VOC_CLASSES
    assert names_of(tmp_path, "\n".join(["_background_", *lines[1:]])) == VOC_CLASSES
    assert names_of(tmp_path, "\n".join([*lines[start:], pattern.format(255, "void")])) == VOC_CLASSES
    assert names_of(tmp_path, "\n".join([pattern.format(0, "__background__"), *lines[1:]])) == VOC_CLASSES


def test_numbers_after_the_names_and_colours_are_left_out(tmp_path):
    assert names_of(tmp_path, "\n".join(f"{name}: {i}" for i, name in enumerate(VOC_CLASSES))) == VOC_CLASSES
    for line in ("{}:{},{},{}::", "{} {} {} {}", "{},{},{},{}"):
        text = "\n".join(line.format(name, i, 0, 128) for i, name in enumerate(VOC_CLASSES))
        assert names_of(tmp_path, "# label:color_rgb:parts:actions\n" + text) == VOC_CLASSES, line


def test_numbers_that_belong_to_the_names_stay(tmp_path):
    assert names_of(tmp_path, "background\n1 euro\n5 euro\n") == ("background", "1 euro", "5 euro")
    assert names_of(tmp_path, "disc\n7 up\n") == ("background", "disc", "7 up")
    assert names_of(tmp_path, "thing 1\nthing 2\n") == ("background", "thing 1", "thing 2")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "utf-8"])
def test_encodings(tmp_path, encoding):
    text = "\n".join(["background", "Möwe", "chat", "château", "perro"])
    assert names_of(tmp_path, text.encode(encoding)) == tuple(text.split("\n"))
    assert names_of(tmp_path, codecs.BOM_UTF16_BE + text.encode("utf-16-be")) == tuple(text.split("\n"))


def test_cp1252_is_said(tmp_path, capsys):
    names_of(tmp_path, "background\nMöwe".encode("cp1252"))
    assert "classes.txt is not in UTF-8: read as cp1252" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("disc\nbackground\nring", r"line 2: 'background': the background belongs in the first line"),
        ("disc\n\n__BG__", r"line 3: '__BG__': the background"),
        ("backgroud\ndisc", r"line 1: 'backgroud': if this is the background"),
        ("- background\ndisc", None),
        ("background\ndisc\nvoid", r"line 3: 'void' is no class"),
        ("background\n__ignore__\ndisc", r"line 2: '__ignore__' is no class"),
        ("background objects\ndisc", r"line 1: 'background objects'"),
        ("0 disc\n1 ring", r"line 1: number 0 for 'disc': 0 is the background's"),
        ("1 background\n2 ring", r"line 1: number 1 for 'background'"),
        ("0 background\n1 disc\n3 ring", r"line 3: number 3 for 'ring', expected 2"),
        ("background\ndisc\nring\ndisc", r"line 4: named twice: disc \(also in line 2\)"),
        ("name\ndisc\nring", r"line 1: 'name' is no class but a header"),
        ("id,name\n1,disc\n2,ring", r"line 1: 'id,name' is no class but a header"),
        ("classes:\n- disc\n- ring", r"line 1: 'classes:' is no class but a header"),
        ("_unlabeled_\ndisc", r"line 1: '_unlabeled_': if this is the background"),
        ("other\ndisc", r"line 1: 'other': if this is the background"),
        ("void\ndisc", r"line 1: 'void' is no class"),
        ("disc\n\nring", r"line 2: an empty line between"),
        ("disc,\nring,", r"line 1: 'disc,': one name a line"),
        ('"disc"\n"ring"', r"line 1: '\"disc\"': one name a line"),
        ("background\n- disc\n- ring", r"line 2: '- disc': one name a line"),
        ("background 0\ndisc 1", r"line 1: 'background 0'"),
        ("disc 1\nring 2", r"line 1: 'disc 1': numbers come before"),
        ("disc ring cat dog", r"line 1: 'disc ring cat dog': one name a line"),
        ("disc, ring", r"line 1: 'disc, ring': one name a line"),
        ("background", "1 classes"),
        ("", "1 classes"),
        (b"\x81\x8d\x8f\xff", "text in neither UTF-8"),
        (b"a\0\0\0\0b\0\0\0c", "no text"),
    ],
)
def test_what_would_be_one_off_is_an_error_that_names_the_line(tmp_path, content, words):
    if words is None:
        assert names_of(tmp_path, content) == ("background", "disc")
        return
    with pytest.raises(DataError, match=r"classes\.txt: " + words):
        names_of(tmp_path, content)


def test_that_the_background_counts_is_said(tmp_path):
    with pytest.raises(DataError, match=r"num_classes=20; the background counts: 21\?"):
        class_names(tmp_path, 20)
    with pytest.raises(DataError, match=r"num_classes=4: write them"):
        class_names(tmp_path, 4)
    with pytest.raises(DataError, match=r"num_classes is 20 but .* names 21 .*: the background counts, num_.* 21"):
        names_of(tmp_path, "\n".join(OBJECTS), 20)


def test_a_name_that_looks_like_a_comment_is_not_left_out(tmp_path):
    with pytest.raises(DataError, match=r"line 3: '#dog': comments stand before the first name only"):
        names_of(tmp_path, "# what there is\ncat\n#dog\nhorse\n")
