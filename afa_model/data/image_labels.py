"""Image-level labels: which classes a photograph shows, from a label file, XML annotations or the masks."""

from __future__ import annotations

import json
import pickle
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .files import outside_classes, values_in

# names under which a data set's own label file is looked for, in its root and beside its list files
LABEL_FILES = ("cls_labels_onehot.npy", "cls_labels.npy", "cls_labels.json")


def multi_hot(present: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Class indices (0 and 255 do not count) -> float32 [num_classes - 1] of 0 and 1."""
    label = torch.zeros(num_classes - 1)
    for index in torch.as_tensor(present).tolist():
        if 0 < index < num_classes:
            label[index - 1] = 1
    return label


def labels_from_mask(path: str | Path, num_classes: int) -> Tensor:
    """Classes that occur in a mask -> float32 [num_classes - 1].

    Raises:
        ValueError: colours instead of indices, or an index that is no class; OSError if unreadable.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"image mode {image.mode}; class indices (mode P or L) are needed")
        present = values_in(image)
    wrong = outside_classes(present, num_classes)
    if wrong:
        raise ValueError(wrong)
    return multi_hot(present, num_classes)


def labels_from_xml(path: str | Path, names: Sequence[str], empty: bool = False) -> Tensor:
    """Classes of the objects in a VOC annotation -> float32 [K - 1]; with ``empty`` there may be none.

    Raises:
        ValueError: no object in it, an object of an unknown class, or no XML; OSError if it cannot be read.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML ({error})") from None
    # only the direct children: an <object> has <part>s (head, hand) with names of their own
    found = [(item.findtext("name") or "").strip() for item in root.findall("object")]
    if not found and not empty:
        raise ValueError("empty annotation: no object")
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(f"unknown class {', '.join(map(repr, unknown))}")
    return multi_hot([names.index(name) for name in found], len(names))


class LabelFile:
    """A ``.npy`` (pickled dict) or ``.json`` file: image name -> K - 1 numbers of 0 and 1, or class names."""

    def __init__(self, path: str | Path, names: Sequence[str]):
        self.path = Path(path)
        self.names = list(names)
        try:
            table = (
                _read_npy_dict(self.path) if self.path.suffix == ".npy" else json.loads(self.path.read_text())
            )
        except FileNotFoundError:
            raise DataError(f"label_file {self.path} not found") from None
        except (ValueError, pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"label_file {self.path} cannot be read: {error}") from None
        if not isinstance(table, Mapping):
            raise DataError(
                f"label_file {self.path}: expected a dict of labels by name, got {type(table).__name__}"
            )
        self.table = table

    def __getitem__(self, name: str) -> Tensor:
        """The label of an image, float32 [K - 1] of 0 and 1.

        Raises:
            ValueError: no entry for this image, or one that is no label.
        """
        keys = (name, name.rsplit("/", 1)[-1], _as_number(name))
        key = next((key for key in keys if key in self.table), None)
        if key is None:
            raise ValueError(f"no entry in {self.path.name}")
        entry = self.table[key]
        if isinstance(entry, (list, tuple)) and entry and all(isinstance(item, str) for item in entry):
            unknown = sorted(set(entry) - set(self.names))
            if unknown:
                raise ValueError(f"unknown class {', '.join(map(repr, unknown))} in {self.path.name}")
            return multi_hot([self.names.index(item) for item in entry], len(self.names))
        try:
            label = np.asarray(entry, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError):
            raise ValueError(f"neither numbers nor class names in {self.path.name}") from None
        if label.size == 0:
            return torch.zeros(len(self.names) - 1)
        if label.size != len(self.names) - 1 or not np.isin(label, (0, 1)).all():
            raise ValueError(
                f"expected {len(self.names) - 1} numbers of 0 or 1 in {self.path.name}, got {label.size}"
            )
        return torch.from_numpy(label)


def find_label_file(root: Path, list_dir: str) -> Path | None:
    """The label file a data set brings along, if there is one."""
    folders = (root, root / list_dir)
    return next(
        (folder / name for folder in folders for name in LABEL_FILES if (folder / name).is_file()), None
    )


def _as_number(name: str) -> int | None:
    """``2007_000032`` -> 2007000032, ``COCO_train2014_000000000009`` -> 9: some label files have numbers for
    names.
    """
    parts = re.fullmatch(r"(\d+)_(\d+)", name.rsplit("/", 1)[-1])
    if parts:
        return int(parts[1] + parts[2])
    tail = re.search(r"(\d+)$", name)
    return int(tail[1]) if tail else None


class _ArrayUnpickler(pickle.Unpickler):
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
            raise pickle.UnpicklingError(f"holds {module}.{name}; only dicts of arrays are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)  # its name since numpy 2


def _read_npy_dict(path: Path) -> Any:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        _, _, dtype = read_header(file)
        if dtype != np.dtype(object):
            raise ValueError("an array of numbers; a dict from image name to label is needed")
        content = _ArrayUnpickler(file).load()
    return content.item() if isinstance(content, np.ndarray) and content.size == 1 else content
