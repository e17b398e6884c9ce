"""What is known of single photographs: masks in a folder, and what a data set in VOC layout has beside its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..runtime.notices import notice
from .classes import class_names
from .image_labels import multi_hot
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
            try:
                return Known(mask, table[name], "label file")
            except ValueError as error:
                raise DataError(f"{photo}: {error}") from error
        if mask is not None:
            return Known(mask, multi_hot(np.unique(mask).astype(np.int64), len(self.names)), "mask")
        return Known()

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
            if place.root not in self._files:
                path = find_label_file(place.root, self.settings.list_dir)
                self._files[place.root] = None if path is None else LabelFile(path, self.names)
            table = self._files[place.root]
        return (table, name) if table is not None and name in table else (None, name)

    def _of_these_classes(self, root: Path) -> bool:
        if root not in self._fits:
            try:
                self._fits[root] = class_names(root, len(self.names)) == self.names
            except DataError:  # another number of them
                self._fits[root] = False
            if not self._fits[root]:
                notice(f"classes of {root}", f"{root} names other classes than the model has: its masks are not used")
        return self._fits[root]
