"""Where a data set lies, and how its files are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ..conventions import IGNORE, require
from .check import CheckLevel
from .photographs import MAX_PIXELS, Exif

LabelSource = Literal["auto", "file", "xml", "masks"]


@dataclass
class DataSettings:
    """Where a data set lies and what its image-level labels come from.

    Args:
        root: folder with ``JPEGImages``, ``SegmentationClassAug`` and ``ImageSets/Segmentation``. Photographs and masks
            may also lie in a folder in theirs (``JPEGImages/train``), as those of COCO do.
        train_split: list of training images: a name in ``list_dir``, or a path.
        val_split: list of images to evaluate on.
        held_out: where a data set has neither masks nor that list, this share of the training images is kept apart,
            and while training the classifier is scored on them (F1, mean average precision).
        num_classes: number of classes, the background counted; None: as ``classes.txt`` in the root says,
            else 21.
        label_source: ``file``, ``xml`` (``Annotations/*.xml``) or ``masks``; ``auto`` takes the first of
            these that is there for training, and the masks for evaluation, which reads them anyway.
        label_file: ``.npy``, ``.npz``, ``.json``, ``.csv``, ``.pkl`` or ``.pt`` file with a label per image name;
            looked for in the root if not given.
        allow_empty: train also on images without any class (COCO has some): they teach the classifier that there is
            none, and are background everywhere. Without it they are taken for a mistake in the annotation.
        check: what to look at before training starts: ``full`` decodes every file, ``headers`` opens them,
            ``off``.
        image_dir: folder of the photographs in the root.
        mask_dir: folder of the masks in the root.
        list_dir: folder of the list files in the root.
        xml_dir: folder of the XML annotations in the root.
        xml_skip: classes in XML annotations that do not count.
        ignore_index: value of mask pixels that do not count, besides 255.
        mask_values: value in a mask's file -> class, such as {0: 0, 255: 1}, or 255 for ignored; values that are not
            named stay as they are.
        mask_palette: ``auto`` reads a mask whose palette has VOC's colours in another order by colour; ``index``
            takes the values, whatever their colours.
        exif: ``apply`` turns photographs as their EXIF orientation says, for masks drawn on them as viewers show them;
            ``ignore`` leaves them as stored.
        max_pixels: a photograph of more is refused.
        num_workers: processes that load and augment training images; 0 does it in the training process.
    """

    root: str = "data/voc"
    train_split: str = "train_aug"
    val_split: str = "val"
    held_out: float = 0.1
    num_classes: int | None = None
    label_source: LabelSource = "auto"
    label_file: str | None = None
    allow_empty: bool = False
    check: CheckLevel = "full"
    image_dir: str = "JPEGImages"
    mask_dir: str = "SegmentationClassAug"
    list_dir: str = "ImageSets/Segmentation"
    xml_dir: str = "Annotations"
    xml_skip: tuple[str, ...] = ()
    ignore_index: int = IGNORE
    mask_values: dict[int, int] | None = None
    mask_palette: Literal["auto", "index"] = "auto"
    exif: Exif = "apply"
    max_pixels: int = MAX_PIXELS
    num_workers: int = 2

    def __post_init__(self) -> None:
        for name in ("root", "train_split", "val_split", "label_file"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        require(self.num_workers >= 0, "num_workers", "at least 0", self.num_workers)
        require(0 <= self.held_out < 1, "held_out", "a share, 0 <= share < 1", self.held_out)
        require(self.exif in ("apply", "ignore"), "exif", "apply or ignore", self.exif)
        require(self.mask_palette in ("auto", "index"), "mask_palette", "auto or index", self.mask_palette)
        require(self.max_pixels >= 1, "max_pixels", "at least 1", self.max_pixels)
        require(0 <= self.ignore_index < 1 << 16, "ignore_index", "a value of a mask, 0..65535", self.ignore_index)
        try:
            values = {int(value): int(index) for value, index in (self.mask_values or {}).items()}
            exact = all(float(k) == int(k) and float(v) == int(v) for k, v in (self.mask_values or {}).items())
            fits = exact and all(0 <= value < 1 << 16 and 0 <= index <= IGNORE for value, index in values.items())
        except (AttributeError, TypeError, ValueError):
            values, fits = {}, False
        expected = "value in the file (0..65535): class (0..254, or 255 for ignored), such as {0: 0, 255: 1}"
        require(fits, "mask_values", expected, self.mask_values)
        self.mask_values = values or None
