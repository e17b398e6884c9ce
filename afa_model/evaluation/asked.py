"""The photographs of a command: by list, split, folder, pattern or path, each with a name of its own."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.lists import entries_of, folder_of_split, list_lines
from ..data.settings import DataSettings
from ..errors import DataError
from .predict import photos


@dataclass
class Asked:
    """What was asked for.

    Attributes:
        photos: name (its path in its folder, without the ending) -> file.
        problems: what is wrong with lines of lists that name no photograph, by their text.
    """

    photos: dict[str, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def asked_photos(images: Sequence[str], data: DataSettings, out: Path) -> Asked:
    """
    Args:
        images: list files (``.txt``), names of the data set's splits, photographs, folders with their sub-folders,
            patterns such as ``photos/*.jpg``.
        data: lists name photographs in this data set; where its root is no folder, in the list's own folder.
        out: is left out of folders.

    Raises:
        DataError: files that do not exist, folders without a photograph, lists of which no line names one, and
            photographs that would share a name.
    """
    lists = {given: path for given in images if (path := _list_of(given, data)) is not None}
    result = Asked()
    owners: dict[str, str] = {}
    clashes: list[str] = []

    def add(name: str, path: Path) -> None:
        file = os.path.abspath(path)
        if owners.setdefault(name, file) != file:
            clashes.append(f"{path}: has the name {name}, as {owners[name]}")
        result.photos.setdefault(name, path)

    for given, path in lists.items():
        entries = _entries(given, path, data)
        for entry in entries:
            if entry.photo is None:
                result.problems[entry.name] = entry.problem
            else:
                add(entry.name, entry.photo)
        if all(entry.photo is None for entry in entries):
            raise DataError(f"images: {path} names no photograph that is there", [item.problem for item in entries])
    others = [given for given in images if given not in lists]
    found = photos(others, out) if others or not lists else {}
    alike = Counter((path.parent, path.stem) for path in found)
    for path, name in found.items():
        add((name if alike[path.parent, path.stem] > 1 else name.with_suffix("")).as_posix(), path)
    if clashes:
        raise DataError("images: photographs of one name; name the folder above them all, or label them apart", clashes)
    return result


def _list_of(given: str, data: DataSettings) -> Path | None:
    path = Path(given).expanduser()
    if path.is_file():
        return path if path.suffix.lower() == ".txt" else None
    split = Path(data.root) / data.list_dir / f"{given}.txt"
    return split if not path.exists() and not glob.has_magic(given) and split.is_file() else None


def _entries(given: str, path: Path, data: DataSettings) -> list:
    root = Path(data.root) if Path(data.root).is_dir() else path.parent
    lines = list_lines(path)
    folder = folder_of_split(root, given, data.image_dir, lines[0][1])
    return entries_of(path, lines, root, folder, data.mask_dir)
