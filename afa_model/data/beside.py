"""What is known of single photographs: masks in a folder, and what a data set in VOC layout has beside its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import DataError, reason
from ..runtime.notices import notice
from .classes import class_names
from .image_labels import labels_from_xml, multi_hot
from .label_file import LabelFile, find_label_file
from .lists import find_file, mask_beside
from .masks import MASK_SUFFIXES, MaskRules, read_mask
from .settings import DataSettings

_MASK_DIRS = ("SegmentationClassAug", "SegmentationClass")  # VOC's own and COCO's, after the one in the settings


class Known(NamedTuple):
    """What is known of one photograph.

    mask    uint8 [H, W], 0..K-1 and 255 (ignored), or None
    labels  float32 [K - 1] of 0 and 1, the classes it shows, or None
    source  where the labels are from: ``label file``, ``mask``, or nothing
    """

    mask: np.ndarray | None = None
    labels: Tensor | None = None
    source: str = ""


@dataclass(frozen=True)
class Place:
    """A photograph in a data set: the data set's root, and the photograph's name in its folder of photographs."""

    root: Path
    name: str


def place_of(photo: str | Path, image_dir: str = "JPEGImages") -> Place | None:
    """Where ``photo`` lies in a data set whose photographs are in ``image_dir`` or in folders in it; None: in none."""
    path = Path(os.path.abspath(photo)).with_suffix("")
    wanted = Path(image_dir).parts
    for folder in path.parents:
        if wanted and folder.parts[-len(wanted) :] == wanted:
            root = folder.parents[len(wanted) - 1]
            return Place(root, path.relative_to(folder).as_posix())
    return None


class Beside:
    """Finds masks and image-level labels of photographs, wherever those lie.

    Args:
        names: K names, background first, which masks and labels are of.
        settings: of the data set that a photograph may lie in (folders, values of masks, exif).
        masks: a folder of masks, each called as its photograph; no other masks are looked for then.
        label_file: of image-level labels; None: the one that a data set brings along.

    A data set that names other classes is left alone, with a line on the error stream.

    Raises:
        DataError: no folder at ``masks``, or a label file that cannot be read.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        settings: DataSettings | None = None,
        masks: str | Path | None = None,
        label_file: str | Path | None = None,
    ) -> None:
        self.names, self.settings = tuple(names), settings or DataSettings()
        own = self.settings
        self.rules = MaskRules(len(names), own.ignore_index, own.mask_values or {}, own.mask_palette == "auto")
        self.masks = None if masks is None else Path(masks).expanduser()
        if self.masks is not None and not self.masks.is_dir():
            raise DataError(f"masks: {self.masks} is not a folder")
        self._given = None if label_file is None else LabelFile(Path(label_file).expanduser(), self.names)
        self._files: dict[Path, LabelFile | None] = {}
        self._fits: dict[Path, bool] = {}

    def of(self, photo: str | Path, size: tuple[int, int] | None = None) -> Known:
        """What is known of a photograph; ``size`` (height, width) is refused to be another than its mask's.

        Raises:
            DataError: a mask or a label that is there and cannot be used.
        """
        place = place_of(photo, self.settings.image_dir)
        if place is not None and not self._of_these_classes(place.root):
            place = None
        path = self._mask_path(Path(photo), place)
        mask = None if path is None else self._read(path, size)
        table, name = self._labels_for(Path(photo), place)
        if table is not None:
            return Known(mask, self._entry(table, name, photo), "label file")
        return Known() if mask is None else Known(mask, self._in_mask(mask), "mask")

    def _entry(self, table: LabelFile, name: str, photo: str | Path) -> Tensor:
        try:
            return table[name]
        except ValueError as error:
            raise DataError(f"{photo}: {error}") from error

    def _in_mask(self, mask: np.ndarray) -> Tensor:
        return multi_hot(np.unique(mask).astype(np.int64), len(self.names))

    def classes_of(self, photo: str | Path, name: str | None = None) -> Known:
        """Which classes a photograph shows, by what training on its data set would go by; no mask is given out.

        That is the label file given, which must have an entry for it; else the data set's label file or its annotation
        in XML, as ``label_source`` says; its mask only where that is ``masks``. ``name``: what it is called where it
        lies in no data set.

        Raises:
            DataError: no entry in the label file given, or a label that is there and cannot be used.
        """
        place = place_of(photo, self.settings.image_dir)
        if self._given is not None:
            called = place.name if place is not None else name or Path(photo).stem
            return Known(None, self._entry(self._given, called, photo), "label file")
        if place is None or not self._of_these_classes(place.root):
            return Known()
        wanted = self.settings.label_source
        if wanted == "masks":
            path = self._mask_path(Path(photo), place)
            return Known() if path is None else Known(None, self._in_mask(self._read(path, None)), "mask")
        table = self._table_of(place.root) if wanted != "xml" else None
        if table is not None and place.name in table:
            return Known(None, self._entry(table, place.name, photo), "label file")
        path = place.root / self.settings.xml_dir / f"{place.name}.xml"
        if wanted == "file" or not path.is_file():
            return Known()
        try:
            return Known(None, labels_from_xml(path, self.names, True, self.settings.xml_skip), "annotation")
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: {reason(error)}") from error

    def _mask_path(self, photo: Path, place: Place | None) -> Path | None:
        if self.masks is not None:
            found = mask_beside(self.masks, place.name) if place is not None else None
            return found or find_file(self.masks, photo.stem, MASK_SUFFIXES)
        if place is None:
            return None
        folders = dict.fromkeys([self.settings.mask_dir, *_MASK_DIRS])
        found = (mask_beside(place.root / folder, place.name) for folder in folders)
        return next((path for path in found if path is not None), None)

    def _read(self, path: Path, size: tuple[int, int] | None) -> np.ndarray:
        try:
            mask = read_mask(path, self.rules, self.settings.exif).classes
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        if size is not None and mask.shape != tuple(size):
            (height, width), (rows, columns) = size, mask.shape
            raise DataError(f"{path}: {columns}x{rows} pixels, its photograph has {width}x{height}")
        return mask

    def _labels_for(self, photo: Path, place: Place | None) -> tuple[LabelFile | None, str]:
        """The label file that has an entry of the photograph, and the name it has it under."""
        name = photo.stem if place is None else place.name
        table = self._given
        if table is None and place is not None:
            table = self._table_of(place.root)
        return (table, name) if table is not None and name in table else (None, name)

    def _table_of(self, root: Path) -> LabelFile | None:
        """The label file of a data set: the one in the settings if it is there, else the one it brings along."""
        if root not in self._files:
            named = self.settings.label_file
            found = next((path for path in (Path(named), root / named) if path.is_file()), None) if named else None
            path = found or find_label_file(root, self.settings.list_dir)
            self._files[root] = None if path is None else LabelFile(path, self.names)
        return self._files[root]

    def _of_these_classes(self, root: Path) -> bool:
        if root not in self._fits:
            try:
                self._fits[root] = class_names(root, len(self.names)) == self.names
            except DataError:  # another number of them
                self._fits[root] = False
            if not self._fits[root]:
                told = "names other classes than the model has: its masks and labels are not used"
                notice(f"classes of {root}", f"{root} {told}")
        return self._fits[root]
