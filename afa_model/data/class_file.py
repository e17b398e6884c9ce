"""`classes.txt`: one name a line, as several tools write it; whatever would put the names one off is an error."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from ..conventions import IGNORE
from ..errors import DataError
from .texts import lines_of

_BACKGROUNDS = ("background", "bg", "bkg", "bkgd")
_IGNORED = ("ignore", "ignored", "void")
_MAYBE_BACKGROUNDS = ("unlabeled", "unlabelled", "none", "other")
_HEADERS = ("name", "names", "class", "classes", "label", "labels", "idname", "nameid", "classname",
            "category", "categories")  # fmt: skip
_REMAINS = re.compile(r"[-*] .*|.*[,;]|([\"']).*\1|\[.*")  # of lists in other languages
_COUNTED = re.compile(r"(.*\S)\s+(\d+)")
_BEFORE = re.compile(r"(\d+)(?:\s*[:;,=.)\]|-]\s*|\s+)(\S.*)")  # 0 background, 0: background
_AFTER = re.compile(r"(.*\S)\s*[:;,=\t]\s*(\d+)")  # background: 0
_COLOUR = re.compile(r"(.*?\S)(?:\s*[:;,]\s*|\s+)\d{1,3}(?:\s*,\s*|\s+)\d{1,3}(?:\s*,\s*|\s+)\d{1,3}(?::[^:]*:[^:]*)?")

Line = tuple[int, str]  # its number in the file, and what it says


def read_class_file(path: str | Path) -> tuple[str, ...]:
    """Names of the classes in a text file, background first.

    The background may be left out, or stand in the first line under another spelling (``__background__``, ``BG``); a
    first line ``__ignore__`` (labelme's), comments (``#``) before the first name, numbers of the classes and colours
    are left out.

    Raises:
        DataError: naming the line: a background that is not first, a number that is not the class's, a name that
            occurs twice or is no class; or a file that is no text.
    """
    path = Path(path)
    written = lines_of(path)
    lines = list(itertools.dropwhile(lambda line: line[1].startswith("#"), written))
    for number, text in lines:
        if text.startswith("#"):  # a comment, or the name of a class that would be missing, and those below one off
            raise _wrong(path, number, f"{text!r}: comments stand before the first name only")
    _refuse_headers(path, lines)
    lines = _without_colours(lines)
    if lines and _plain(lines[0][1]) in _IGNORED and lines[0][1].startswith("_"):
        lines = lines[1:]
    lines = _without_numbers(path, lines)
    if lines and _plain(lines[0][1]) in _BACKGROUNDS:
        lines = lines[1:]
    for number, name in lines:
        plain = _plain(name)
        if plain in _BACKGROUNDS:
            raise _wrong(path, number, f"{name!r}: the background belongs in the first line")
        if plain in _IGNORED or (name[:1] == name[-1:] == "_" and "ignore" in plain):
            raise _wrong(path, number, f"{name!r} is no class: leave the line out (ignored pixels are {IGNORE})")
        near = difflib.SequenceMatcher(None, plain, "background").ratio() > 0.85
        if "background" in plain or (near and number == lines[0][0]):
            raise _wrong(path, number, f"{name!r}: if this is the background, write 'background' in the first line")
    _refuse_remains(path, written, lines)
    names = ["background", *(name for _, name in lines)]
    first: dict[str, int] = {}
    for number, name in lines:
        if first.setdefault(name, number) != number:
            raise _wrong(path, number, f"named twice: {name} (also in line {first[name]})")
    if not 2 <= len(names) <= IGNORE:
        raise DataError(f"{path}: {len(names)} classes with the background; expected 2 to {IGNORE}")
    return tuple(names)


def _refuse_headers(path: Path, lines: Sequence[Line]) -> None:
    if lines and _plain(lines[0][1]) in _HEADERS:
        raise _wrong(path, lines[0][0], f"{lines[0][1]!r} is no class but a header: leave it out")
    if lines and _plain(lines[0][1]) in _MAYBE_BACKGROUNDS:
        raise _wrong(path, lines[0][0], f"{lines[0][1]!r}: if this is the background, write 'background'")


def _refuse_remains(path: Path, written: Sequence[Line], lines: Sequence[Line]) -> None:
    """What would become part of a name, or shift the names by one."""
    for number, name in lines:
        if _REMAINS.fullmatch(name):
            raise _wrong(path, number, f"{name!r}: one name a line, without marks around it")
    if len(lines) == 1 and re.search(r"[,;]|\S\s+\S+\s+\S", lines[0][1]):
        raise _wrong(path, lines[0][0], f"{lines[0][1][:40]!r}: one name a line")
    counted = [_COUNTED.fullmatch(name) for _, name in lines]
    if len(lines) > 1 and all(counted) and len({match[1] for match in counted}) == len(lines):
        numbers = [int(match[2]) for match in counted]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            raise _wrong(path, lines[0][0], f"{lines[0][1]!r}: numbers come before the names, or after a colon")
    for (before, _), (after, _) in pairwise(written):
        if after != before + 1:
            raise _wrong(path, before + 1, "an empty line between the names")


def is_no_class(name: str) -> bool:
    """Whether a label is a name of the background (``bg``, ``__Background__``), or labelme's ``__ignore__``."""
    return _plain(name) in _BACKGROUNDS or (_plain(name) in _IGNORED and name.startswith("_"))


def _plain(name: str) -> str:
    """A name without case and separators: ``__Background__`` is ``background``."""
    return re.sub(r"[\W_]+", "", name.casefold())


def _wrong(path: Path, number: int, what: str) -> DataError:
    return DataError(f"{path}: line {number}: {what}")


def _without_colours(lines: Sequence[Line]) -> list[Line]:
    """``background 0 0 0`` and CVAT's ``background:0,0,0::`` where every line has them."""
    found = [_COLOUR.fullmatch(text) for _, text in lines]
    return [(number, match[1]) for (number, _), match in zip(lines, found)] if all(found) else list(lines)


def _without_numbers(path: Path, lines: list[Line]) -> list[Line]:
    """Lines without the number of the class, before or after the name, where every line (but a background's) has it."""
    for pattern, number_and_name in (
        (_BEFORE, lambda match: (int(match[1]), match[2])),
        (_AFTER, lambda match: (int(match[2]), match[1])),
    ):
        found = _matched(pattern, number_and_name, lines)
        if found is not None:
            return _in_order(path, found)
    return lines


def _matched(
    pattern: re.Pattern[str], number_and_name: Callable[[re.Match[str]], tuple[int, str]], lines: list[Line]
) -> list[tuple[int, int, str]] | None:
    """(line, number, name) of every line, or None if these are no numbers of classes."""
    found = []
    for position, (line, text) in enumerate(lines):
        match = pattern.fullmatch(text)
        if match is not None:
            found.append((line, *number_and_name(match)))
        elif position == 0 and _plain(text) in _BACKGROUNDS:
            found.append((line, 0, text))
        else:
            return None
    bare = len(found) > 1 and pattern.fullmatch(lines[0][1]) is None  # a background without a number:
    if bare and [number for _, number, _ in found] != list(range(len(found))):
        return None  # numbers that belong to the names
    return found if len(found) > 1 else None


def _in_order(path: Path, found: list[tuple[int, int, str]]) -> list[Line]:
    if _plain(found[-1][2]) in _IGNORED and found[-1][1] == IGNORE:
        found = found[:-1]
    line, start, name = found[0]
    if _plain(name) in _IGNORED and start != 0:
        found, (line, start, name) = found[1:], found[1] if len(found) > 1 else found[0]
    background = _plain(name) in _BACKGROUNDS
    if start not in (0, 1) or background != (start == 0):
        raise _wrong(path, line, f"number {start} for {name!r}: 0 is the background's, the classes begin at 1")
    for expected, (line, number, name) in enumerate(found, start):
        if number != expected:
            raise _wrong(
                path,
                line,
                f"number {number} for {name!r}, expected {expected} (if the numbers belong to the names, write"
                " 'background' in the first line)",
            )
    return [(line, name) for line, _, name in found]
