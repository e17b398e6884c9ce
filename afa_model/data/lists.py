"""List files: which photograph a line names, and which mask.

A line is a name (``2007_000032``), with folders if there are any (``train2014/x``), with spaces if the file has them;
or the path of a photograph, from the folder of the photographs, from the data set's root or from ``/``; or two columns,
photograph and mask. What a line says is what is loaded: a name that is not there is an error and never the name of
another file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from .masks import MASK_SUFFIXES
from .photographs import IMAGE_SUFFIXES
from .texts import lines_of

_FIRST_TRIES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")  # without a look at the whole folder
_BETWEEN = re.compile(r"\s*[,;]\s*|\s+")
_MEMBERSHIP = re.compile(r"(\S+)\s+(-1|0|1)")  # VOC's lists of a class: name, and whether it shows the class

_HEADINGS = {"image", "images", "img", "photo", "filename", "file", "name", "id", "path", "mask", "masks", "label",
             "image_path", "mask_path", "image_id", "split"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of a list.

    Attributes:
        name: of the image: its path in the folder of the photographs, without the ending.
        photo: its file, or None if there is none.
        mask: the file that the line names for the mask, whether it is there or not; None if it names none.
        problem: what is wrong with the line where ``photo`` is None.
    """

    name: str
    photo: Path | None
    mask: Path | None
    problem: str = ""


def list_file(root: str | Path, split: str, list_dir: str = "ImageSets/Segmentation") -> Path:
    """The file of a split: ``<root>/<list_dir>/<split>.txt``, or ``split`` itself if it is a path.

    Raises:
        DataError: root or list missing; the lists that exist are named.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder")
    candidates = [root / list_dir / f"{split}.txt", Path(split), root / split]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        there = ", ".join(sorted(file.stem for file in (root / list_dir).glob("*.txt"))) or "none"
        raise DataError(f"split {split!r}: {candidates[0]} not found (lists there: {there})")
    return path


def read_split(
    root: str | Path, split: str, list_dir: str = "ImageSets/Segmentation", image_dir: str = "JPEGImages"
) -> list[str]:
    """Image names of a split, whether their photographs are there or not.

    Raises:
        DataError: root or list missing, the list empty or no text, or names that occur twice.
    """
    path = list_file(root, split, list_dir)
    return [entry.name for entry in entries_of(path, list_lines(path), Path(root), image_dir, "SegmentationClassAug")]


def list_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines of a list that say something.

    Raises:
        DataError: the list is empty or no text.
    """
    lines = lines_of(path)
    if not lines:
        raise DataError(f"{path} lists no images")
    return lines


def entries_of(path: Path, lines: Sequence[tuple[int, str]], root: Path, image_dir: str, mask_dir: str) -> list[Entry]:
    """What the lines of the list ``path`` name.

    Raises:
        DataError: images that are listed twice, or none.
    """
    of_class = [_MEMBERSHIP.fullmatch(text) for _, text in lines]
    if all(of_class) and any(match[2] == "-1" for match in of_class):
        lines = [(number, match[1]) for (number, _), match in zip(lines, of_class)]
    numbers: dict[str, list[int]] = {}
    entries = []
    named_so = any(text.startswith("#") and locate(text, root, root / image_dir) for _, text in lines)
    for number, text in lines:
        entry = _entry(path, number, text, root, image_dir, mask_dir)
        if entry is None and named_so and not re.search(r"\s", text):  # where "#1" is a name, "#2" is no comment
            entry = Entry(text, None, None, f"{image_dir}/{text}.jpg: not found (line {number} of {path.name})")
        if entry is not None:
            numbers.setdefault(entry.name, []).append(number)
            entries.append(entry)
    if not entries:
        raise DataError(f"{path} lists no images")
    twice = [f"{name} (lines {', '.join(map(str, where))})" for name, where in numbers.items() if len(where) > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} names are listed twice", twice)
    return entries


def _entry(path: Path, number: int, text: str, root: Path, image_dir: str, mask_dir: str) -> Entry | None:
    folder = root / image_dir
    found = locate(text, root, folder)
    if found is not None:
        problem = _is_mask(found[1], folder, root / mask_dir)
        return Entry(text, None, None, f"{path} line {number}: {text!r}{problem}") if problem else Entry(*found, None)
    if text.startswith("#"):
        return None
    for space in _BETWEEN.finditer(text):
        left, right = text[: space.start()], text[space.end() :]
        found = locate(left, root, folder) if left else None
        if found is None:
            continue
        problem = _is_mask(found[1], folder, root / mask_dir)
        if problem:
            swapped = " (columns swapped? the photograph comes first)" if locate(right, root, folder) else ""
            return Entry(text, None, None, f"{path} line {number}: {left!r}{problem}{swapped}")
        if right.startswith("#"):
            return Entry(*found, None)
        mask = _mask_of(right, found[0], root, root / mask_dir)
        if mask is not None:
            return Entry(*found, mask)
        return Entry(text, None, None, f"{path} line {number}: {text!r}: no photograph of this name"
                     f" ({left!r} is one, but {right!r} is no mask)")  # fmt: skip
    if set(re.split(r"[\s,;]+", text.lower())) <= _HEADINGS:
        return Entry(text, None, None, f"{path} line {number}: {text!r} is no photograph (a header? leave it out)")
    first, _, rest = text.partition(" ")
    if first.lower().endswith(IMAGE_SUFFIXES) and rest.lower().endswith(MASK_SUFFIXES):
        text = first
    name = _clean(text)
    bare = name.lower().endswith(IMAGE_SUFFIXES)
    inside = name.startswith("/") or name.startswith(f"{image_dir}/")
    where = (name if inside else f"{image_dir}/{name}") + ("" if bare else ".jpg")
    name = _named(os.path.splitext(name)[0] if bare else name, image_dir)
    return Entry(name, None, None, f"{where}: not found (line {number} of {path.name})")


def _is_mask(photo: Path, folder: Path, masks: Path) -> str:
    """What to say if a photograph lies in the masks' folder, unless all of them do; else nothing."""
    place, masks_place = _real(str(photo.parent)), _real(str(masks))
    if _inside(place, masks_place) and not _inside(_real(str(folder)), masks_place):
        return f" lies in {masks.name}, the masks' folder, and is no photograph"
    return ""


def _inside(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=256)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def locate(text: str, root: Path, folder: Path) -> tuple[str, Path] | None:
    """(name, file) of the photograph that a line or its first column names, or None."""
    for form in _forms(text):
        if not form:
            continue
        inside = form.lstrip("/")
        above = [root.absolute().parent] if inside.split("/")[0] == root.absolute().name else []
        bases = [place / inside for place in (folder, *([root, *above] if "/" in inside else []))]
        if form.startswith("/") or re.match(r"[A-Za-z]:/", form):
            bases.insert(0, Path(form))
        for base in bases:
            file = None
            if base.suffix.lower() in IMAGE_SUFFIXES:
                file = find_file(base.parent, base.stem, (base.suffix.lower(),))
            file = file or find_file(base.parent, base.name, IMAGE_SUFFIXES)
            if file is not None:
                return _name_of(file, root, folder), file
    return None


def find_file(folder: str | Path, name: str, suffixes: Sequence[str]) -> Path | None:
    """The file ``name`` in ``folder`` by one of the endings, in upper or lower case; the first of the endings wins."""
    base = os.path.join(folder, name)
    for suffix in suffixes[:1] if len(suffixes) == 1 else _FIRST_TRIES:
        if suffix.lower() in suffixes and os.path.isfile(base + suffix):
            return Path(base + suffix)
    parent, stem = os.path.split(base)
    try:
        listed = _listing(parent, os.stat(parent).st_mtime_ns)
    except OSError:
        return None
    endings = {suffix.lower(): suffix for suffix in listed.get(unicodedata.normalize("NFC", stem), ())}
    found = next((endings[suffix] for suffix in suffixes if suffix in endings), None)
    if found is None:
        return None
    exact = f"{base}{found}"
    return Path(exact) if os.path.isfile(exact) else _by_normal_form(parent, stem + found)


@lru_cache(maxsize=64)
def _listing(folder: str, changed: int) -> dict[str, list[str]]:
    """Names in a folder without their endings -> endings; ``changed`` tells a folder from what it was before."""
    listed: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        stem, suffix = os.path.splitext(name)
        listed.setdefault(unicodedata.normalize("NFC", stem), []).append(suffix)
    return listed


def _by_normal_form(folder: str, name: str) -> Path | None:
    """macOS writes é as two characters, most lists as one."""
    wanted = unicodedata.normalize("NFC", name)
    names = (other for other in os.listdir(folder) if unicodedata.normalize("NFC", other) == wanted)
    return next((Path(folder, other) for other in names), None)


def _forms(text: str) -> Iterator[str]:
    """A line as it is, without quotation marks, with the slashes of Windows turned."""
    bare = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    yield from dict.fromkeys([_dotless(text), _dotless(bare), _clean(text)])


def _clean(text: str) -> str:
    bare = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    return _dotless(bare.replace("\\", "/"))


def _dotless(path: str) -> str:
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def _named(path: str, image_dir: str) -> str:
    """The name that a path without its ending stands for, where its file is not there."""
    path = path.lstrip("/")
    return path.removeprefix(f"{image_dir}/")


def _name_of(file: Path, root: Path, folder: Path) -> str:
    """A photograph's path in their folder (or else in the root, or else its own name), without its ending."""
    bare = os.path.splitext(os.path.abspath(file))[0]
    for base in (folder, root):
        inside = os.path.relpath(bare, os.path.abspath(base))
        if not inside.startswith(".."):
            return inside.replace(os.sep, "/")
    return os.path.basename(bare)


def _mask_of(text: str, name: str, root: Path, folder: Path) -> Path | None:
    """The file that a second column names; None if it is no path of a mask."""
    form = _clean(text)
    if not form.lower().endswith(MASK_SUFFIXES) and "/" not in form:
        return None
    base = Path(form.lstrip("/"))
    bases = [place / base for place in (root, folder, root.absolute().parent)]
    if form.startswith("/") or re.match(r"[A-Za-z]:/", form):
        bases.insert(0, Path(form))
    for path in bases:
        found = find_file(path.parent, path.stem, (path.suffix.lower(),)) if path.suffix else None
        found = found or find_file(path.parent, path.name, MASK_SUFFIXES)
        if found is not None:
            return found
    return root / base if Path(form).stem == name.rsplit("/", 1)[-1] else None


def mask_beside(folder: Path, name: str) -> Path | None:
    """The mask of an image in the masks' folder, whose sub-folders are those of the photographs or none."""
    found = find_file(folder, name, MASK_SUFFIXES)
    if found is None and "/" in name and not (folder / name).parent.is_dir():
        found = find_file(folder, name.rsplit("/", 1)[-1], MASK_SUFFIXES)
    return found


def folder_of_split(root: Path, split: str, folder: str, first: str) -> str:
    """The folder in the root where the photograph of a split's first line is: itself, or one in it (COCO), first the
    split's own.
    """
    parts = dict.fromkeys([first, first.split()[0]])
    return _place_of_split(
        root, split, folder, lambda place: any(locate(part, root, root / place) is not None for part in parts)
    )


def masks_of_split(root: Path, split: str, folder: str, first: str) -> str:
    """Likewise of the masks; ``first`` is the name of the first image."""
    return _place_of_split(root, split, folder, lambda place: mask_beside(root / place, first) is not None)


def _place_of_split(root: Path, split: str, folder: str, is_there: Callable[[str], bool]) -> str:
    path = Path(split)
    own = path.stem if path.suffix == ".txt" else path.name
    inside = sorted(child.name for child in (root / folder).glob("*") if child.is_dir())
    places = [folder, *(f"{folder}/{name}" for name in sorted(inside, key=lambda name: name != own))]
    found = next((place for place in places if is_there(place)), None)
    return found or (f"{folder}/{own}" if f"{folder}/{own}" in places else folder)
