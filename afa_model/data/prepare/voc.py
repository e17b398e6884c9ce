"""PASCAL VOC 2012 -> a data set with masks and image-level labels.

In the root, as in the archive: ``JPEGImages``, ``Annotations``, ``ImageSets``, ``SegmentationClass``; and besides

    SegmentationClassAug/NAME.png              VOC's masks, to which `afa prepare sbd` adds those of SBD
    cls_labels.json, cls_labels_onehot.npy     image-level labels: the classes of the objects in Annotations
    classes.txt
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ...runtime.progress import in_threads
from ...runtime.writing import whole, writable_folder
from ..classes import VOC_CLASSES
from ..image_labels import objects_in
from ..label_file import LabelFile
from ..texts import lines_of
from .downloads import Archive, obtain, unpack
from .record import class_lines, write_labels, write_lines, write_vectors

LISTS = "ImageSets/Segmentation"
_INSIDE = "VOCdevkit/VOC2012"
_FOLDERS = ("JPEGImages", "Annotations", "ImageSets", "SegmentationClass")


@dataclass(frozen=True)
class VocCounts:
    """How much there is: names in the lists of segmentation, and photographs in all."""

    train: int = 1_464
    val: int = 1_449
    photographs: int = 17_125


def voc_archive() -> Archive:
    """VOC 2012, where torchvision knows it to be."""
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    year = DATASET_YEAR_DICT["2012"]
    return Archive(year["filename"], year["url"], year["md5"], "2 GB")


def prepare_voc(
    root: str | Path, offline: bool = False, archive: Archive | None = None, counts: VocCounts | None = None
) -> list[str]:
    """Make VOC 2012 in ``root``; what is there is kept. Returns lines that say what there is.

    Raises:
        DataError: naming all that is missing, where it is to be had and where to put it.
    """
    root, counts = Path(root).expanduser(), counts or VocCounts()
    if missing_of_voc(root, counts):
        writable_folder(root, "root")
        (path,) = obtain([archive or voc_archive()], root, offline)
        unpack(path, root, {f"{_INSIDE}/{folder}": folder for folder in _FOLDERS})
        problems = missing_of_voc(root, counts)
        if problems:
            raise DataError(f"root {root}: VOC 2012 is not complete", problems)
    names = {split: names_in(root, split) for split in ("train", "val")}
    own = [name for split in names.values() for name in split]
    in_threads(lambda name: _copy_mask(root, name), own, "masks")
    more = names_in(root, "train_aug") if list_path(root, "train_aug").is_file() else []
    write_voc_labels(root, sorted({*own, *more}))
    lines = [f"VOC 2012 in {root}: {len(names['train'])} photographs in train, {len(names['val'])} in val, with masks"]
    if more:
        lines.append(f"{len(more)} photographs in train_aug; next: afa train --config voc --data.root {root}")
    else:
        lines.append(f"next: afa prepare sbd --root {root}, which makes train_aug; or --data.train_split train without")
    return lines


def list_path(root: Path, split: str) -> Path:
    """The file of a list."""
    return root / LISTS / f"{split}.txt"


def names_in(root: Path, split: str) -> list[str]:
    """The names in a list that is there."""
    return [text for _, text in lines_of(list_path(root, split))]


def missing_of_voc(root: Path, counts: VocCounts) -> list[str]:
    """A line for each list that is not there or not as long as it should be, and each file that its names lack."""
    problems: list[str] = []
    for split, expected in (("train", counts.train), ("val", counts.val)):
        problems += missing_list(root, split, expected) or [
            f"{file}: not found"
            for name in names_in(root, split)
            for file in (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", f"Annotations/{name}.xml")
            if not (root / file).is_file()
        ]
    there = sum(path.suffix == ".jpg" for path in (root / "JPEGImages").glob("[!.]*"))
    if there < counts.photographs:
        problems.append(f"JPEGImages: {there} photographs, expected {counts.photographs}")
    inside = root / _INSIDE
    if problems and inside.is_dir():
        problems.append(f"{inside} is there; is that the root (--root {inside})?")
    return problems


def missing_list(root: Path, split: str, expected: int) -> list[str]:
    """A line if a list is not there, or not as long as it should be."""
    path = list_path(root, split)
    if not path.is_file():
        return [f"{LISTS}/{split}.txt: not found"]
    there = len(set(names_in(root, split)))
    return [] if there == expected else [f"{LISTS}/{split}.txt: {there} names, expected {expected}"]


def _copy_mask(root: Path, name: str) -> None:
    target = root / "SegmentationClassAug" / f"{name}.png"
    if not target.is_file():
        with whole(target) as path:
            shutil.copyfile(root / "SegmentationClass" / f"{name}.png", path)


def write_voc_labels(root: Path, names: Sequence[str]) -> None:
    """Image-level labels of these photographs, from their annotations, and ``classes.txt``; label files that have an
    entry for each of them are left as they are.

    Raises:
        DataError: naming each annotation that is missing or names another class.
    """
    classes = VOC_CLASSES[1:]
    if not (root / "classes.txt").is_file():
        write_lines(root / "classes.txt", class_lines(classes))
    files = [root / "cls_labels.json", root / "cls_labels_onehot.npy"]
    if all(_holds(path, names) for path in files):
        return

    def shown(name: str) -> list[str] | str:
        path = root / "Annotations" / f"{name}.xml"
        try:
            found = set(objects_in(path))
        except (OSError, ValueError) as error:
            return f"Annotations/{name}.xml: {'not found' if isinstance(error, FileNotFoundError) else error}"
        unknown = sorted(found - set(classes))
        if unknown or not found:
            return f"Annotations/{name}.xml: " + (f"unknown class {unknown[0]!r}" if unknown else "no object")
        return [label for label in classes if label in found]

    labels = dict(zip(names, in_threads(shown, names, "labels")))
    problems = [label for label in labels.values() if isinstance(label, str)]
    if problems:
        raise DataError(f"root {root}: annotations cannot be used", problems)
    write_labels(root, labels)
    write_vectors(root, labels, classes)


def _holds(path: Path, names: Collection[str]) -> bool:
    if not path.is_file():
        return False
    try:
        table = LabelFile(path, VOC_CLASSES)
    except DataError:
        return False
    return all(name in table for name in names)
