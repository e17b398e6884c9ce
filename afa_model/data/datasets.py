"""Data sets in VOC layout for training (image-level labels) and evaluation (masks)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..runtime.progress import in_threads
from .check import CheckLevel, FileReport, check_files
from .classes import class_names
from .files import find_image, read_label, read_photo, read_split
from .image_labels import LabelFile, find_label_file, labels_from_mask, labels_from_xml, multi_hot
from .transforms import AugmentSettings, TrainingTransform, normalize

LabelSource = Literal["auto", "file", "xml", "masks"]


@dataclass
class DataSettings:
    """Where a data set lies and what its image-level labels come from.

    Args:
        root: folder with ``JPEGImages``, ``SegmentationClassAug`` and ``ImageSets/Segmentation``. Photographs and masks
            may also lie in a folder in theirs (``JPEGImages/train``), as those of COCO do.
        train_split: list of training images: a name in ``list_dir``, or a path.
        val_split: list of images to evaluate on.
        num_classes: number of classes, the background counted; None: as ``classes.txt`` in the root says,
            else 21.
        label_source: ``file``, ``xml`` (``Annotations/*.xml``) or ``masks``; ``auto`` takes the first of
            these that is there for training, and the masks for evaluation, which reads them anyway.
        label_file: ``.npy`` or ``.json`` file with a label per image name; looked for in the root if not
            given.
        without_class: what a training image without any class is: ``refuse``, an error in the annotation, or
            ``background`` (COCO has some; they are trained as showing none).
        check: what to look at before training starts: ``full`` decodes every file, ``headers`` opens them,
            ``off``.
        image_dir: folder of the photographs in the root.
        mask_dir: folder of the masks in the root.
        list_dir: folder of the list files in the root.
        xml_dir: folder of the XML annotations in the root.
        num_workers: processes that load and augment training images; 0 does it in the training process.
    """

    root: str = "data/voc"
    train_split: str = "train_aug"
    val_split: str = "val"
    num_classes: int | None = None
    label_source: LabelSource = "auto"
    label_file: str | None = None
    without_class: Literal["refuse", "background"] = "refuse"
    check: CheckLevel = "full"
    image_dir: str = "JPEGImages"
    mask_dir: str = "SegmentationClassAug"
    list_dir: str = "ImageSets/Segmentation"
    xml_dir: str = "Annotations"
    num_workers: int = 2

    def __post_init__(self) -> None:
        for name in ("root", "train_split", "val_split", "label_file"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.without_class not in ("refuse", "background"):
            raise ValueError(f"without_class: expected refuse or background, got {self.without_class!r}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: expected at least 0, got {self.num_workers}")


class VOCData(Dataset):
    """Names, labels and files of one split; what training and evaluation sets share.

    Attributes:
        names: the image names, in the order of the list file.
        class_names: K names, background first.
        num_classes: K.
        label_source: where image-level labels come from (``file``, ``xml`` or ``masks``).

    Raises:
        DataError: with a line for every missing or broken file of the split.
    """

    def __init__(self, settings: DataSettings, split: str, for_training: bool):
        self.settings = settings
        self.split = split
        self.root = Path(settings.root)
        self.names = read_split(self.root, split, settings.list_dir)
        self.image_dir = self._of_split(settings.image_dir, find_image)
        self.mask_dir = self._of_split(settings.mask_dir, _find_mask)
        self.class_names = class_names(settings.root, settings.num_classes)
        self.num_classes = len(self.class_names)
        self.label_source, label_file = self._choose_source(for_training)

        masks_needed = not for_training or self.label_source == "masks"
        reports = check_files(
            self.root,
            self.names,
            image_dir=self.image_dir,
            mask_dir=self.mask_dir if masks_needed else None,
            num_classes=self.num_classes,
            level=settings.check,
            title=f"checking {split}",
        )
        self.labels = self._read_labels(label_file, reports, for_training)
        problems = [line for report in reports for line in report.problems]
        if problems:
            broken = sum(bool(report.problems) for report in reports)
            raise DataError(
                f"split {split!r} of {self.root}: {broken} of {len(self.names)} images cannot be used",
                problems,
            )

    def __len__(self) -> int:
        return len(self.names)

    def photo_path(self, index: int) -> Path:
        """The file of a photograph."""
        path = find_image(self.root / self.image_dir, self.names[index])
        if path is None:
            raise DataError(f"{self.image_dir}/{self.names[index]}.jpg is gone since the check")
        return path

    def mask_path(self, index: int) -> Path:
        """The file of a mask."""
        return self.root / self.mask_dir / f"{self.names[index]}.png"

    def _of_split(self, folder: str, find: Callable[[Path, str], Path | None]) -> str:
        """The folder in the root where the split's first file is: itself, or one in it, before all the split's own."""
        path, first = Path(self.split), self.names[0]
        own = path.stem if path.suffix == ".txt" else path.name
        inside = sorted(child.name for child in (self.root / folder).glob("*") if child.is_dir())
        places = [folder, *(f"{folder}/{name}" for name in sorted(inside, key=lambda name: name != own))]
        found = next((place for place in places if find(self.root / place, first) is not None), None)
        return found or (f"{folder}/{own}" if own in inside else folder)

    def _choose_source(self, for_training: bool) -> tuple[str, Path | None]:
        settings = self.settings
        given = Path(settings.label_file) if settings.label_file else None
        if given is not None and not given.is_file() and (self.root / given).is_file():
            given = self.root / given
        found = given or find_label_file(self.root, settings.list_dir)
        source = settings.label_source
        if source == "auto":
            if not for_training and given is None:
                source = "masks"
            elif found is not None:
                source = "file"
            else:
                source = "xml" if (self.root / settings.xml_dir).is_dir() else "masks"
        if source == "file" and found is None:
            raise DataError(
                f"label_source is 'file' but no label_file is given and none is found in {self.root}"
            )
        if not for_training and not (self.root / settings.mask_dir).is_dir():
            raise DataError(f"evaluation needs masks: {self.root} has no folder {settings.mask_dir}")
        if source == "masks" and not (self.root / settings.mask_dir).is_dir():
            raise DataError(
                f"no labels: {self.root} has no label file, no {settings.xml_dir} and no {settings.mask_dir}"
            )
        return source, found if source == "file" else None

    def _read_labels(self, label_file: Path | None, reports: list[FileReport], for_training: bool) -> Tensor:
        """The labels of all images [N, K-1]; what is wrong with one is added to its report."""
        table = LabelFile(label_file, self.class_names) if label_file else None
        refuse = for_training and self.settings.without_class == "refuse"

        def read(item: tuple[str, FileReport]) -> Tensor:
            name, report = item
            none = torch.zeros(self.num_classes - 1)
            where = name
            try:
                if table is not None:
                    label = table[name]
                elif self.label_source == "xml":
                    where = f"{self.settings.xml_dir}/{name}.xml"
                    label = labels_from_xml(self.root / where, self.class_names, empty=not refuse)
                else:
                    where = f"{self.mask_dir}/{name}.png"
                    if report.problems:
                        return none  # said already
                    if report.classes is None:  # the check was a light one
                        label = labels_from_mask(self.root / where, self.num_classes)
                    else:
                        label = multi_hot(report.classes, self.num_classes)
                if refuse and not label.any():
                    raise ValueError("empty annotation: no class but background")
                return label
            except FileNotFoundError:
                report.problems.append(f"{where}: not found")
            except (ValueError, OSError) as error:
                report.problems.append(f"{where}: {error}")
            return none

        return torch.stack(in_threads(read, list(zip(self.names, reports)), f"labels of {self.split}"))


def _find_mask(folder: Path, name: str) -> Path | None:
    path = folder / f"{name}.png"
    return path if path.is_file() else None


class TrainingSet(VOCData):
    """Augmented crops with image-level labels; masks are never given out.

    ``dataset[index, seed]`` is a dict:

    - ``image`` float32 [3, crop, crop], normalised by ImageNet's mean and standard deviation, black where padded;
    - ``cls_labels`` float32 [K-1], 1 for every class the photograph shows;
    - ``img_box`` int64 [4] (y0, y1, x0, x1): where the photograph lies in the crop, ends not included;
    - ``name`` the image's name.

    The sample depends on ``(index, seed)`` alone.
    """

    def __init__(
        self, settings: DataSettings, augment: AugmentSettings | None = None, split: str | None = None
    ):
        super().__init__(settings, split or settings.train_split, for_training=True)
        self.transform = TrainingTransform(augment or AugmentSettings())

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = item if isinstance(item, tuple) else (item, 0)
        image, img_box = self.transform(read_photo(self.photo_path(index)), seed)
        return {
            "image": image,
            "cls_labels": self.labels[index],
            "img_box": img_box,
            "name": self.names[index],
        }


class EvaluationSet(VOCData):
    """Whole photographs with their masks.

    ``dataset[index]`` is a dict:

    - ``image`` float32 [3, H, W], normalised;
    - ``mask`` int64 [H, W], 0..K-1 and 255 (ignored);
    - ``cls_labels`` float32 [K-1];
    - ``name`` the image's name.
    """

    def __init__(self, settings: DataSettings, split: str | None = None):
        super().__init__(settings, split or settings.val_split, for_training=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": normalize(read_photo(self.photo_path(index))),
            "mask": read_label(self.mask_path(index)),
            "cls_labels": self.labels[index],
            "name": self.names[index],
        }
