"""Label files: which classes each image shows, in the formats in which people keep that."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..runtime.tensor_files import told
from .image_labels import multi_hot
from .photographs import IMAGE_SUFFIXES
from .texts import lines_of, read_text

# names under which a data set's own label file is looked for, in its root and beside its list files
LABEL_FILES = ("cls_labels_onehot.npy", "cls_labels.npy", "cls_labels.json")

_HEADS = ("image", "images", "file", "filename", "file_name", "name", "id", "image_id", "image_name", "path", "img")


class LabelFile:
    """A file with the classes of each image.

    An entry is K - 1 numbers of 0 and 1 (the background has none), the name of a class or a list of them, or a mapping
    from names of classes to 0 or 1. The kinds of files:

    - ``.json``: a dict from image to entry; ``.pkl`` and ``.npy``: the same, of numbers and arrays only;
    - ``.npz``: an array for each image, or ``names`` [N] and ``labels`` [N, K - 1];
    - ``.pt``, ``.pth``: a dict of tensors;
    - ``.csv``, ``.tsv``, ``.txt``: ``image,cat;dog`` or ``image,0,1,...``, or a first line with the classes'
      names above their columns.

    Raises:
        DataError: the file is missing, cannot be read or holds something else.
    """

    def __init__(self, path: str | Path, names: Sequence[str]):
        self.path = Path(path)
        self.names = list(names)
        reader = _READERS.get(self.path.suffix.lower())
        if reader is None:
            raise DataError(
                f"label_file {self.path}: ending {self.path.suffix or 'missing'!r}, expected {', '.join(_READERS)}"
            )
        try:
            table = reader(self.path, self.names)
        except FileNotFoundError:
            raise DataError(f"label_file {self.path} not found") from None
        except Exception as error:  # readers of broken files raise whatever they like
            raise DataError(f"label_file {self.path} cannot be read: {_first_line(error)}") from None
        if not isinstance(table, Mapping):
            raise DataError(
                f"label_file {self.path}: expected a dict of labels by name, got {type(table).__name__}"
            )
        self.table = table
        self._by_stem: dict[str, Any] = {}
        for key in (key for key in table if isinstance(key, str)):
            for stem in {bare := _bare(key), bare.rsplit("/", 1)[-1]}:
                self._by_stem[stem] = None if stem in self._by_stem else key  # of two files of one name neither

    def __contains__(self, name: str) -> bool:
        return self.key_of(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        """The label of an image, float32 [K - 1] of 0 and 1.

        Raises:
            ValueError: no entry for this image, or one that is no label.
        """
        key = self.key_of(name)
        if key is None:
            raise ValueError(f"no entry in {self.path.name}")
        entry = self.table[key]
        if entry is None:
            raise ValueError(f"null in {self.path.name}; for no class write []")
        if isinstance(entry, Mapping):
            self._refuse_unknown(entry)
            entry = [item for item, value in entry.items() if self._is_one(value)] or torch.zeros(len(self.names) - 1)
        if isinstance(entry, str):
            entry = [entry] if entry in self.names else [part for part in re.split(r"\s*[;|,]\s*", entry) if part]
        if isinstance(entry, (list, tuple)) and entry and all(isinstance(item, str) for item in entry):
            self._refuse_unknown(entry)
            return multi_hot([self.names.index(item) for item in entry], len(self.names))
        try:
            label = np.asarray(entry, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError):
            raise ValueError(f"neither numbers nor class names in {self.path.name}: {str(entry)[:60]}") from None
        if label.size == 0:
            return torch.zeros(len(self.names) - 1)
        expected = f"expected {len(self.names) - 1} numbers of 0 or 1 in {self.path.name}"
        if label.size != len(self.names) - 1:
            hint = " (the background has none)" if label.size == len(self.names) else ""
            raise ValueError(f"{expected}, got {label.size}{hint}")
        wrong = np.flatnonzero(~np.isin(label, (0, 1)))
        if wrong.size:
            place = int(wrong[0])
            raise ValueError(f"{expected}, got {label[place]:g} for {self.names[place + 1]}")
        return torch.from_numpy(label)

    def _refuse_unknown(self, found: Iterable[str]) -> None:
        unknown = sorted(set(map(str, found)) - set(self.names))
        if unknown:
            raise ValueError(f"unknown class {', '.join(map(repr, unknown))} in {self.path.name}")

    def key_of(self, name: str) -> Any:
        """The key of an image's entry: its name, its file's name alone, its number; None if it has no entry."""
        base = name.rsplit("/", 1)[-1]
        for key in (name, base, _as_number(name)):
            if key is not None and key in self.table:
                return key
        whole, key = self._by_stem.get(name), self._by_stem.get(base)
        return whole or (key if key is not None and same_folders(name, _bare(key)) else None)

    def _is_one(self, value: object) -> bool:
        if value not in (0, 1):
            raise ValueError(f"expected 0 or 1 in {self.path.name}, got {value!r}")
        return bool(value)


def find_label_file(root: Path, list_dir: str) -> Path | None:
    """The label file a data set brings along, if there is one."""
    folders = (root, root / list_dir)
    return next(
        (folder / name for folder in folders for name in LABEL_FILES if (folder / name).is_file()), None
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _bare(key: str) -> str:
    """A path without the ending of a photograph."""
    path = key.replace("\\", "/")
    return os.path.splitext(path)[0] if path.lower().endswith(IMAGE_SUFFIXES) else path


def same_folders(one: str, other: str) -> bool:
    """Whether the folders of two paths are the same as far as both have any, from the file upwards: a path may begin
    above the other's folder; ``dogs/1`` is never ``cats/1``.
    """
    pairs = zip(reversed(one.split("/")[:-1]), reversed(other.split("/")[:-1]))
    return all(ours == theirs for ours, theirs in pairs)


def _as_number(name: str) -> int | None:
    """``2007_000032`` -> 2007000032, ``COCO_train2014_000000000009`` -> 9: some label files have numbers for
    names.
    """
    parts = re.fullmatch(r"(\d+)_(\d+)", name.rsplit("/", 1)[-1])
    if parts:
        return int(parts[1] + parts[2])
    tail = re.search(r"(\d+)$", name)
    return int(tail[1]) if tail else None


def _json(path: Path, names: Sequence[str]) -> Any:
    return json.loads(read_text(path), object_pairs_hook=each_key_once)


def each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Python's reader keeps the last of two entries of one name."""
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} has two entries")
    return table


def _torch(path: Path, names: Sequence[str]) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # broken bytes make the unpickler raise whatever they lead it to
        raise ValueError(f"{told(error)} (save {{image: [class names]}} as .json)") from None
    if not isinstance(content, Mapping):
        return content
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in content.items()}


def _pickled(path: Path, names: Sequence[str]) -> Any:
    with path.open("rb") as file:
        return ArrayUnpickler(file).load()


def _npz(path: Path, names: Sequence[str]) -> Any:
    with np.load(path, allow_pickle=False) as content:
        arrays = {key: content[key] for key in content.files}
    if set(arrays) == {"names", "labels"} and arrays["names"].ndim == 1:
        if len(arrays["names"]) != len(arrays["labels"]):
            raise ValueError(f"{len(arrays['names'])} names but {len(arrays['labels'])} labels")
        return dict(zip(arrays["names"].tolist(), arrays["labels"]))
    return arrays


def _csv(path: Path, names: Sequence[str]) -> dict[str, Any]:
    lines = lines_of(path)
    if not lines:
        raise ValueError("it is empty")
    delimiter = next((mark for mark in "\t,;" if mark in lines[0][1]), " ")
    cells_of = [next(csv.reader([text], delimiter=delimiter)) for _, text in lines]
    rows = [(number, [cell.strip() for cell in cells]) for (number, _), cells in zip(lines, cells_of)]
    columns, has_head = _head(rows, names)
    rows = rows[has_head:]
    _refuse_swapped([cells for _, cells in rows], names)
    table: dict[str, Any] = {}
    for number, (name, *cells) in rows:
        if columns is not None:
            if len(cells) != len(columns):
                raise ValueError(f"line {number}: {len(cells)} columns, the first line names {len(columns)}")
            entry: Any = dict(zip(columns, (_number(cell, number) for cell in cells)))
            entry.pop(names[0], None)
        elif len(cells) == len(names) - 1 and all(re.fullmatch(r"[01](\.0*)?", cell) for cell in cells):
            entry = [float(cell) for cell in cells]
        else:
            entry = [part for cell in cells for part in _classes(cell, names)]
            entry = [*table.get(name, ()), *entry]  # a line for each class
        if name in table and not (isinstance(entry, list) and isinstance(table[name], list)):
            raise ValueError(f"line {number}: {name!r} has a line already")
        table[name] = entry
    return table


def _head(rows: Sequence[tuple[int, list[str]]], names: Sequence[str]) -> tuple[list[str] | None, bool]:
    """The classes that the cells of the first line name, if it names any, and whether it is no line like the others.

    Whatever its first cell says: a first line of words above lines of numbers names the columns.
    """
    number, head = rows[0]
    later = [cells for _, cells in rows[1:]]
    resolved = [_class_of(cell, names) for cell in head]
    least = min(2, len(names) - 1)
    of_numbers = any(len(cells) > least and _numbers(cells[1:]) for cells in later)
    if not of_numbers:
        is_word = head[0].lower() in _HEADS and (not later or not any(resolved[1:]))
        whole = head[0].lower() in _HEADS and len(head) > 2 and set(names[1:]) <= set(resolved[1:])
        return None, is_word or whole
    all_names = len(head) >= len(names) and all(resolved[1:])
    if _numbers(head[1:]) and not all_names:
        return None, False
    shorter = len(head) == len(later[0]) - 1 and all(resolved)  # R's, or an empty first cell before a tab
    cells, columns = (head, resolved) if shorter else (head[1:], resolved[1:])
    if len(names) == 2 and len(cells) == 1 and columns == [None]:
        return None, True  # one column for the one class may be called anything
    for cell, column in zip(cells, columns):
        if column is None:
            raise ValueError(f"line {number}: column {cell!r} is no class")
        if columns.count(column) > 1:
            raise ValueError(f"line {number}: two columns for {column!r}")
    for name in names[1:]:
        if name not in columns:
            raise ValueError(f"line {number}: no column for {name!r}")
    return [column for column in columns if column is not None], True


def _numbers(cells: Sequence[str]) -> bool:
    """Whether most of the cells are numbers (or True and False, which are told later)."""
    found = sum(re.fullmatch(r"[+-]?\d+(\.\d*)?|true|false", cell, re.I) is not None for cell in cells)
    return 2 * found > len(cells)


def _class_of(cell: str, names: Sequence[str]) -> str | None:
    """The class that a column's name is, in upper or lower case; None if it is none, or several."""
    if cell in names:
        return cell
    alike = [name for name in names if name.casefold() == cell.casefold()]
    return alike[0] if len(alike) == 1 else None


def _refuse_swapped(rows: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    rows = rows[1:] or rows  # the first may be a header
    if rows and all(len(cells) == 2 and cells[0] in names and cells[1] not in names for cells in rows):
        raise ValueError(f"columns swapped? {rows[0][0]!r} is a class; the image comes first")


def _number(cell: str, line: int) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"line {line}: expected 0 or 1, got {cell!r}") from None


def _classes(cell: str, names: Sequence[str]) -> list[str]:
    if cell in names:
        return [cell]
    parts = [part.strip() for part in re.split(r"[;|,]", cell) if part.strip()]
    spaced = [word for part in parts for word in ([part] if part in names else part.split())]
    return spaced if all(word in names for word in spaced) else parts


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled dicts of numpy arrays and nothing else: a label file from somewhere must not be able to
    run code.
    """

    _ALLOWED = {
        ("_reconstruct", "numpy.core.multiarray"),
        ("_reconstruct", "numpy._core.multiarray"),
        ("scalar", "numpy.core.multiarray"),
        ("scalar", "numpy._core.multiarray"),
        ("_frombuffer", "numpy.core.numeric"),
        ("_frombuffer", "numpy._core.numeric"),
        ("ndarray", "numpy"),
        ("dtype", "numpy"),
        ("encode", "_codecs"),
        ("OrderedDict", "collections"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (name, module) not in self._ALLOWED:
            raise pickle.UnpicklingError(
                f"holds {module}.{name}; only dicts of arrays are read, since others may run code when they are opened"
                " (save {image: [class names]} as .json)"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)  # its name since numpy 2


def _npy(path: Path, names: Sequence[str]) -> Any:
    with path.open("rb") as file:
        content = dictionary_in(file)
    if content is None:
        raise ValueError("an array of numbers; a dict from image name to label is needed")
    return content


def dictionary_in(file: BinaryIO, unpickler: type[ArrayUnpickler] = ArrayUnpickler) -> Any:
    """What ``np.save`` made of a Python object in an opened ``.npy``; None if it holds an array of numbers."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if dtype != np.dtype(object):
        return None
    content = unpickler(file).load()
    return content.item() if isinstance(content, np.ndarray) and content.size == 1 else content


_READERS: dict[str, Callable[[Path, Sequence[str]], Any]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _csv,
    ".pkl": _pickled,
    ".pickle": _pickled,
    ".pt": _torch,
    ".pth": _torch,
}
