"""Which classes photographs show, by name, out of the files in which people and programs keep that.

What is read, and what counts of it (pixels and boxes never do):

- ``.csv``, ``.tsv``, ``.txt``: ``file,label;label``, a line for each photograph or for each label, with or without a
  first line of headings; where that names columns of files and labels, other columns do not count; or headings that
  are the classes above columns of 0 and 1;
- ``.json``: ``{file: [label, ...]}`` or ``[{"file": ..., "labels": [...]}]``;
- ``.json`` of COCO: the categories of a photograph's annotations, in the order of their ids;
- ``.json`` of LabelMe, one for each photograph: the labels of its shapes, and its flags that are true;
- ``.xml`` of VOC, one for each photograph: the names of its objects; of CVAT: labels of shapes and tags;
- a folder: every ``.json`` and ``.xml`` in it and below.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from ...errors import DataError, naming
from ..class_file import is_no_class
from ..files import files_below
from ..image_labels import objects_in, parsed_xml
from ..label_file import each_key_once
from ..texts import lines_of, read_text

_TABLES = (".csv", ".tsv", ".txt")
_FILE_KEYS = ("file", "file_name", "filename", "image", "name", "path")
_LABEL_KEYS = ("labels", "label", "classes", "class", "tags")
_LABEL_COLUMNS = {*_LABEL_KEYS, "tag", "category", "categories", "class_name", "class_names", "category_name",
                  "label_name", "label_names", "classname", "labelname"}  # fmt: skip
_ONE_OR_ZERO = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_HEADINGS = {*_FILE_KEYS, "photo", "photograph", "images", "id", "image_id", "image_name", "img"}


@dataclass
class Annotations:
    """What label files say.

    Attributes:
        labels: the photograph, as the file calls it -> names of its classes.
        order: all classes in an order that the file gives them (COCO's ids); empty: it gives none.
    """

    labels: dict[str, list[str]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def add(self, photo: str, labels: Iterable[str]) -> None:
        """More of a photograph's labels; the background is none."""
        own = self.labels.setdefault(photo, [])
        named = [" ".join(label.split()) for label in labels]
        own += [label for label in dict.fromkeys(named) if label and label not in own and not is_no_class(label)]


def read_annotations(path: str | Path) -> Annotations:
    """What a label file, or all those in a folder, say.

    Raises:
        DataError: the file is missing, cannot be read, or is none of the kinds above; or the folder holds none.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"labels: {path} not found")
    found = Annotations()
    if not path.is_dir():
        with naming(path, "labels"):
            _read(path, "", found)
        return found
    files = sorted(
        here / name
        for here, names in files_below(path)
        for name in names
        if name.lower().endswith((".json", ".xml")) and not name.startswith(".")
    )
    if not files:
        raise DataError(f"labels: no .json and no .xml in {path} or below it (give a table's own path)")
    problems = []
    for file in files:
        try:
            with naming(file, "labels"):
                _read(file, file.parent.relative_to(path).as_posix(), found)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"labels: {len(problems)} of {len(files)} files in {path} cannot be used", problems)
    return found


def _read(path: Path, folder: str, found: Annotations) -> None:
    """``folder``: where the file lies in the folder that was given, which the photographs' names begin with."""
    kind = path.suffix.lower()
    if kind in _TABLES:
        _read_table(path, found)
    elif kind == ".json":
        _read_json(path, folder, found)
    elif kind == ".xml":
        _read_xml(path, folder, found)
    else:
        expected = ", ".join([*_TABLES, ".json", ".xml"])
        raise DataError(f"labels {path}: ending {path.suffix or 'missing'!r}, expected {expected}, or a folder")


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_table(path: Path, found: Annotations) -> None:
    lines = lines_of(path)
    if not lines:
        raise ValueError("it is empty")
    delimiter = next((mark for mark in "\t,;" if mark in lines[0][1]), " ")
    cells = [next(csv.reader([text], delimiter=delimiter)) for _, text in lines]
    rows = [(number, [cell.strip() for cell in row]) for (number, _), row in zip(lines, cells)]
    head, body = rows[0][1], rows[1:]
    columns = _named_columns(head)
    if columns is not None:
        file, labels = columns
        for number, row in body:
            if len(row) < len(head):
                raise ValueError(f"line {number}: {len(row)} cells, the first line names {len(head)}")
            more = row[len(head) :] if labels[-1] == len(head) - 1 else []  # a label for each further cell
            _add_row(found, number, row[file], [*(row[column] for column in labels), *more])
        return
    heading = _key(head[0]) in _HEADINGS
    if body and (heading or not _zeros_and_ones(head)) and all(_zeros_and_ones(row, len(head)) for _, row in body):
        for _, row in body:
            found.add(row[0], [name for name, cell in zip(head[1:], row[1:]) if _ONE_OR_ZERO[cell.lower()]])
        found.order += [name for name in head[1:] if name not in found.order and not is_no_class(name)]
        return
    rows = body if heading else rows
    if not heading and len(head) > 2 and _zeros_and_ones(head):
        raise ValueError(f"line {rows[0][0]}: numbers without a first line that names the classes")
    _refuse_numbers(head if heading else None, rows)
    for number, (photo, *cells) in rows:
        _add_row(found, number, photo, cells)


def _add_row(found: Annotations, number: int, photo: str, cells: Sequence[str]) -> None:
    if not photo:
        raise ValueError(f"line {number}: no file; expected file,label;label")
    found.add(photo, [part for cell in cells for part in re.split(r"[;|,]", cell)])


def _key(cell: str) -> str:
    return re.sub(r"\W+", "_", cell.strip().lower()).strip("_")


def _named_columns(head: Sequence[str]) -> tuple[int, list[int]] | None:
    """Which column has the files and which have the labels, if the first line names both; other columns are no labels,
    such as the sides of a box.
    """
    keys = [_key(cell) for cell in head]
    file = next((keys.index(key) for key in (*_FILE_KEYS, *sorted(_HEADINGS - {"id"}), "id") if key in keys), None)
    labels = [column for column, key in enumerate(keys) if key in _LABEL_COLUMNS and column != file]
    return (file, labels) if file is not None and labels else None


def _zeros_and_ones(row: Sequence[str], length: int | None = None) -> bool:
    return len(row) > 1 and len(row) == (length or len(row)) and all(cell.lower() in _ONE_OR_ZERO for cell in row[1:])


def _refuse_numbers(head: Sequence[str] | None, rows: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Numbers among several columns are boxes, scores or sizes, which would become classes called 40 and 0.5.

    Raises:
        ValueError: a column holds numbers alone.
    """
    width = max((len(row) for _, row in rows), default=0)
    for column in range(1, width if width > 2 else 0):
        cells = [row[column] for _, row in rows if len(row) > column and row[column]]
        if cells and all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", cell.lower()) for cell in cells):
            called = f" ({head[column]})" if head and len(head) > column else ""
            raise ValueError(
                f"column {column + 1}{called} holds numbers such as {cells[0]}, which are no labels; a first line that"
                " names the columns file and label says which count, one that names the classes what 0 and 1 mean"
            )


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, folder: str, found: Annotations) -> None:
    content = json.loads(read_text(path), object_pairs_hook=each_key_once)
    if isinstance(content, Mapping) and {"images", "annotations", "categories"} <= set(content):
        _read_coco(content, found)
    elif isinstance(content, Mapping) and "shapes" in content:
        photo = str(content.get("imagePath") or path.stem).replace("\\", "/").rsplit("/", 1)[-1]
        flags = content.get("flags") or {}
        said = [str(shape.get("label") or "") for shape in content["shapes"] or ()]
        found.add(_inside(folder, photo), [*said, *(str(name) for name, value in flags.items() if value is True)])
    elif isinstance(content, Mapping):
        for photo, labels in content.items():
            found.add(photo, _named(labels, photo))
    elif isinstance(content, list):
        for number, item in enumerate(content, 1):
            photo, labels = (_first(item, keys) for keys in (_FILE_KEYS, _LABEL_KEYS))
            if not isinstance(photo, str) or labels is None:
                raise ValueError(f'entry {number}: expected {{"file": ..., "labels": [...]}}, got {str(item)[:60]}')
            found.add(photo, _named(labels, photo))
    else:
        raise ValueError(f"expected {{file: [labels]}}, a list of files with labels, COCO or LabelMe, got {content!r}")


def _first(item: Any, keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if key in item), None) if isinstance(item, Mapping) else None


def _named(labels: Any, photo: str) -> list[str]:
    labels = re.split(r"[;|,]", labels) if isinstance(labels, str) else labels  # as in a table's cell
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{photo!r}: expected a list of class names, got {str(labels)[:60]}")
    return labels


def _read_coco(content: Mapping[str, Any], found: Annotations) -> None:
    names = {item["id"]: str(item["name"]) for item in content["categories"]}
    files = {item["id"]: str(item["file_name"]) for item in content["images"]}
    for photo in files.values():
        found.add(photo, ())
    for item in content["annotations"]:
        if item["image_id"] not in files or item["category_id"] not in names:
            raise ValueError(f"annotation {item.get('id')} is of an image or a category that is not in the file")
        found.add(files[item["image_id"]], [names[item["category_id"]]])
    in_order = (names[key] for key in sorted(names))
    found.order += [name for name in in_order if name not in found.order and not is_no_class(name)]


# --- XML --------------------------------------------------------------------------------------------------------------


def _read_xml(path: Path, folder: str, found: Annotations) -> None:
    root = parsed_xml(path)
    if root.tag == "annotations":
        if root.find("track") is not None:
            raise ValueError("CVAT's annotation of a video; export it as CVAT for images")
        for image in root.iter("image"):
            found.add(str(image.get("name")).replace("\\", "/"), _cvat_labels(image))
        return
    names = objects_in(path)
    said = next((item.text for item in root if item.tag == "filename"), None) or path.stem
    # annotation programs leave another file's name, or a path, when a photograph was renamed; the XML's own name counts
    own = PurePosixPath(said.strip().replace("\\", "/")).name
    found.add(_inside(folder, own if PurePosixPath(own).stem == path.stem else path.stem), names)


def _cvat_labels(image: ElementTree.Element) -> list[str]:
    return [str(item.get("label")) for item in image if item.get("label")]


def _inside(folder: str, name: str) -> str:
    return name if folder in ("", ".") else f"{folder}/{name}"
