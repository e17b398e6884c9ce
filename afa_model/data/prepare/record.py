"""A prepared folder: what it was made of (``prepare.json``), and the files that training reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError, reason
from ...runtime.writing import whole
from ..class_file import read_class_file

RECORD = "prepare.json"
_MADE_BY = "afa prepare folder"


@dataclass
class Photograph:
    """What is kept of a photograph.

    Attributes:
        source: the file that it was made of.
        size, changed, sha256: of that file.
        labels: names of the classes it shows.
        val: kept for validation.
    """

    source: str
    size: int
    changed: int
    sha256: str
    labels: list[str]
    val: bool | None = None


@dataclass
class Record:
    """What a prepared folder was made of.

    Attributes:
        settings: those that decide how its files look, and the split.
        classes: names without the background, in the order of their numbers.
        photographs: by name.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    photographs: dict[str, Photograph] = field(default_factory=dict)

    def write(self, root: Path) -> None:
        """Into ``root``, whole or not at all."""
        content = {"made_by": _MADE_BY, "masks": False, **asdict(self)}
        with whole(root / RECORD) as path:
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_record(root: Path) -> Record | None:
    """What is known of a folder that was prepared before; None if there is none yet, or it is empty.

    Raises:
        ConfigError: it holds something else, or its record cannot be read.
    """
    path = root / RECORD
    if not path.is_file():
        others = sorted(item.name for item in root.iterdir() if not item.name.startswith(".")) if root.is_dir() else []
        if others:
            raise ConfigError(
                f"root: {root} holds {', '.join(others[:3])}{', ...' * (len(others) > 3)} and no {RECORD}: it was not"
                " prepared by this command, and nothing in it is changed; choose another folder"
            )
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        photographs = {name: Photograph(**item) for name, item in content["photographs"].items()}
        return Record(dict(content["settings"]), list(content["classes"]), photographs)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"root: {path} cannot be read ({reason(error)}); choose another folder, or remove this one"
        raise ConfigError(told) from None


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A text file of these lines, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def class_lines(classes: Sequence[str]) -> list[str]:
    """The lines of ``classes.txt``, the background first; with numbers where names alone would be read otherwise, such
    as ``3 apples``.

    Raises:
        DataError: a name that no such file can hold.
    """
    names, wrong = ["background", *classes], ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classes.txt"
        for lines in (names, [f"{number}: {name}" for number, name in enumerate(names)]):
            write_lines(path, lines)
            try:
                read = read_class_file(path)
            except DataError as error:
                wrong = wrong or str(error).removeprefix(f"{path}: ")
                continue
            if read == tuple(names):
                return lines
            wrong = wrong or f"{next(name for name in names if name not in read)!r} would be read as another name"
    raise DataError(f"classes: {wrong} (the lines would be {', '.join(names[:20])}); rename it, or leave it out by"
                    " --classes")  # fmt: skip


def write_labels(root: Path, labels: Mapping[str, Sequence[str]]) -> None:
    """Image-level labels of all photographs as ``cls_labels.json``, ``{name: [class, ...]}``, a line for each."""
    rows = (f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(list(own), ensure_ascii=False)}"
            for name, own in labels.items())  # fmt: skip
    with whole(root / "cls_labels.json") as path:
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def write_vectors(root: Path, labels: Mapping[str, Sequence[str]], classes: Sequence[str]) -> None:
    """Image-level labels as other repositories read them, ``cls_labels_onehot.npy``: a dictionary name -> float32
    [K - 1] of 0 and 1.
    """
    number = {name: place for place, name in enumerate(classes)}
    vectors = {}
    for name, own in labels.items():
        vectors[name] = np.zeros(len(classes), np.float32)
        vectors[name][[number[label] for label in own]] = 1
    with whole(root / "cls_labels_onehot.npy") as path:
        np.save(path, np.array(vectors, dtype=object), allow_pickle=True)
