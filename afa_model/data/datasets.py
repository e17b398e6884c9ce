"""Data sets in VOC layout for training (image-level labels) and evaluation (masks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..conventions import IGNORE
from ..errors import DataError
from ..runtime.notices import notice
from ..runtime.progress import in_threads
from .check import (
    FileReport,
    Files,
    check_files,
    check_together,
    named,
    refuse_own_mask,
    refuse_shared,
    shown,
)
from .classes import class_names
from .files import read_photo
from .image_labels import labels_from_xml, multi_hot
from .label_file import LabelFile, find_label_file
from .lists import entries_of, folder_of_split, list_file, list_lines, mask_beside, masks_of_split
from .masks import MaskRules, read_mask
from .settings import DataSettings
from .transforms import AugmentSettings, TrainingTransform, normalize


class VOCData(Dataset):
    """Names, labels and files of one split; what training and evaluation sets share.

    Attributes:
        names: the image names, in the order of the list file.
        class_names: K names, background first.
        num_classes: K.
        label_source: where image-level labels come from (``file``, ``xml`` or ``masks``).
        has_masks: whether an image comes with its mask.

    Raises:
        DataError: with a line for every missing or broken file of the split.
    """

    has_masks = False

    def __init__(self, settings: DataSettings, split: str, for_training: bool):
        self.settings = settings
        self.split = split
        self.root = Path(settings.root)
        try:
            path = list_file(self.root, split, settings.list_dir)
        except DataError as error:
            if for_training or not self.root.is_dir():
                raise
            raise DataError(f"{error} (to train without evaluation: --eval.every 0)") from None
        lines = list_lines(path)
        self.image_dir = folder_of_split(self.root, split, settings.image_dir, lines[0][1])
        entries = entries_of(path, lines, self.root, self.image_dir, settings.mask_dir)
        self.names = [entry.name for entry in entries]
        self.mask_dir = masks_of_split(self.root, split, settings.mask_dir, self.names[0])
        self.class_names = class_names(settings.root, settings.num_classes)
        self.num_classes = len(self.class_names)
        self.rules = MaskRules(
            self.num_classes, settings.ignore_index, settings.mask_values or {}, settings.mask_palette == "auto"
        )
        wrong = [index for index in self.rules.mask_values.values() if self.num_classes <= index != IGNORE]
        if wrong:
            raise DataError(f"data.mask_values: class {wrong[0]} outside 0..{self.num_classes - 1} and {IGNORE}")
        self.label_source, label_file = self._choose_source(for_training)

        folder = self.root / self.mask_dir
        self._masks = [
            entry.mask or mask_beside(folder, entry.name) or folder / f"{entry.name}.png" for entry in entries
        ]
        self._photos = [entry.photo for entry in entries]
        masks_needed = not for_training or self.label_source == "masks"
        files = [
            Files(entry.photo, entry.problem, mask if masks_needed else None)
            for entry, mask in zip(entries, self._masks)
        ]
        reports = check_files(
            self.root,
            files,
            rules=self.rules,
            exif=settings.exif,
            max_pixels=settings.max_pixels,
            level=settings.check,
            title=f"checking {split}",
        )
        refuse_own_mask(files, reports, self.root)
        masks = [shown(str(item.mask), self.root) if item.mask and item.mask.is_file() else None for item in files]
        refuse_shared(self.names, masks, reports, "the mask")
        self.labels = self._read_labels(label_file, reports, for_training)
        check_together(self.root, files, reports, self.rules, settings.exif)
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
        """The file of a photograph.

        Raises:
            DataError: there is none (the check may have been off).
        """
        path = self._photos[index]
        if path is None:
            raise DataError(f"{self.root / self.image_dir / self.names[index]}.jpg: not found")
        return path

    def mask_path(self, index: int) -> Path:
        """The file of a mask."""
        return self._masks[index]

    def read_photo(self, index: int) -> Tensor:
        """A photograph, uint8 [3, H, W], 0..255.

        Raises:
            DataError: naming the file, if it cannot be read.
        """
        return read_photo(self.photo_path(index), self.settings.exif, self.settings.max_pixels)

    def read_mask(self, index: int) -> Tensor:
        """A mask, int64 [H, W], 0..K-1 and 255 (ignored).

        Raises:
            DataError: naming the file, if it cannot be read or holds no classes.
        """
        path = self.mask_path(index)
        try:
            return torch.from_numpy(read_mask(path, self.rules, self.settings.exif).classes.copy()).long()
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

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
            raise DataError(
                f"evaluation needs masks: {self.root} has no folder {settings.mask_dir} (to train without"
                " evaluation: --eval.every 0)"
            )
        if source == "masks" and not (self.root / settings.mask_dir).is_dir():
            raise DataError(
                f"no labels: {self.root} has no label file, no {settings.xml_dir} and no {settings.mask_dir}"
            )
        return source, found if source == "file" else None

    def _read_labels(self, label_file: Path | None, reports: list[FileReport], for_training: bool) -> Tensor:
        """The labels of all images [N, K-1]; what is wrong with one is added to its report."""
        table = LabelFile(label_file, self.class_names) if label_file else None
        if table is not None:
            keys = [table.key_of(name) for name in self.names]
            refuse_shared(self.names, keys, reports, f"in {table.path.name} the entry")
        settings = self.settings
        refuse = for_training and not settings.allow_empty
        from_masks: list[str] = []

        def of_annotation(name: str) -> tuple[str, Tensor | None]:
            """Where the label is from, and the label; None if it is the mask's to say."""
            if table is not None:
                if not for_training and name not in table:
                    return name, None
                return name, table[name]
            if self.label_source == "xml":
                where = f"{settings.xml_dir}/{name}.xml"
                if not for_training and not (self.root / where).is_file():
                    return where, None
                return where, labels_from_xml(self.root / where, self.class_names, not refuse, settings.xml_skip)
            return name, None

        def of_mask(number: int, report: FileReport) -> Tensor:
            if report.classes is None:  # the check was a light one
                report.decoded(read_mask(self._masks[number], self.rules, settings.exif))
            return multi_hot(report.classes, self.num_classes)

        def read(item: tuple[int, FileReport]) -> Tensor:
            number, report = item
            name, none = self.names[number], torch.zeros(self.num_classes - 1)
            where = f"{settings.xml_dir}/{name}.xml" if self.label_source == "xml" else name
            try:
                where, label = of_annotation(name)
                if label is None:
                    if self.label_source != "masks":
                        from_masks.append(name)
                    where = shown(str(self._masks[number]), self.root)
                    if report.problems:
                        return none  # said already
                    label = of_mask(number, report)
                if refuse and not label.any():
                    raise ValueError(
                        "empty annotation: no class but background (with data.allow_empty it is trained on as showing"
                        f" none){_only_ignored(report)}"
                    )
                return label
            except FileNotFoundError:
                report.problems.append(f"{where}: not found")
            except (DataError, ValueError, OSError) as error:
                report.problems.append(shown(named(error, where), self.root))
            return none

        labels = torch.stack(in_threads(read, list(enumerate(reports)), f"labels of {self.split}"))
        if from_masks:
            source = label_file or f"{self.root / settings.xml_dir}"
            notice(
                f"labels {self.split} {source}",
                f"{len(from_masks)} of {len(self.names)} images of {self.split} have no label in {source}: the classes"
                " in their masks are taken",
            )
        return labels


def _only_ignored(report: FileReport) -> str:
    if report.stored in ((0, IGNORE), (IGNORE,)):
        return "; its mask holds 0 and 255 alone, and 255 is ignored: data.mask_values: {255: 1} makes it class 1"
    return ""


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
        image, img_box = self.transform(self.read_photo(index), seed)
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

    has_masks = True

    def __init__(self, settings: DataSettings, split: str | None = None):
        super().__init__(settings, split or settings.val_split, for_training=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, mask = self.read_photo(index), self.read_mask(index)
        if photo.shape[1:] != mask.shape:  # the check may have been off
            (height, width), (rows, columns) = photo.shape[1:], mask.shape
            raise DataError(f"{self.mask_path(index)}: {columns}x{rows} pixels, its photograph has {width}x{height}")
        return {
            "image": normalize(photo),
            "mask": mask,
            "cls_labels": self.labels[index],
            "name": self.names[index],
        }
