"""COCO 2014 -> a data set with VOC-style masks and image-level labels.

    JPEGImages/{train,val}/NAME.jpg            the photographs, called as in the archives (COCO_train2014_000000000009)
    SegmentationClass/{train,val}/NAME.png     masks
    ImageSets/Segmentation/{train,val}.txt     their names
    cls_labels.json, cls_labels_onehot.npy     image-level labels: the categories of the annotations that are no crowds
    classes.txt                                the 80 categories

In a mask the 80 categories are 1..80 in ascending order of their ids. Where annotations overlap the one of fewer pixels
is on top (of as many, that of the higher id), for what is small lies before what is large; regions annotated as crowds
are 255 (ignored) where nothing else is.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...conventions import IGNORE
from ...errors import DataError, naming
from ...runtime.progress import in_threads
from ...runtime.writing import whole, writable_folder
from ..files import write_label
from .downloads import Archive, obtain, unpack
from .record import class_lines, write_labels, write_lines, write_vectors
from .voc import list_path

SPLITS = ("train", "val")
_SERVER = "http://images.cocodataset.org"


@dataclass(frozen=True)
class CocoCounts:
    """How many photographs and categories there are."""

    train: int = 82_783
    val: int = 40_504
    categories: int = 80


def coco_archives() -> dict[str, Archive]:
    """The photographs of each split and the annotations; torchvision knows no place of these."""
    rows = (
        ("train", "zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", "13 GB"),
        ("val", "zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", "6 GB"),
        ("annotations", "annotations/annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd", "241 MB"),
    )
    return {key: Archive(Path(path).name, f"{_SERVER}/{path}", md5, size) for key, path, md5, size in rows}


def prepare_coco(
    root: str | Path,
    offline: bool = False,
    archives: Mapping[str, Archive] | None = None,
    counts: CocoCounts | None = None,
) -> list[str]:
    """Make COCO 2014 in ``root``; what is there is kept. Returns lines that say what there is.

    Raises:
        DataError: naming all that is missing, where it is to be had and where to put it.
    """
    root, counts, archives = Path(root).expanduser(), counts or CocoCounts(), archives or coco_archives()
    _pycocotools()
    for split in SPLITS:
        _take_unpacked(root, split)
    needed = [split for split in SPLITS if _photographs(root, split) < getattr(counts, split)]
    needed += ["annotations"] * (not all(_annotations(root, split).is_file() for split in SPLITS))
    if needed:
        writable_folder(root, "root")
        for key, path in zip(needed, obtain([archives[key] for key in needed], root, offline)):
            files = {f"annotations/{_annotations(root, split).name}": _annotations(root, split) for split in SPLITS}
            inside = {place: str(file.relative_to(root)) for place, file in files.items()}
            unpack(path, root, inside if key == "annotations" else {f"{key}2014": f"JPEGImages/{key}"})
    labels: dict[str, list[str]] = {}
    lines, names = [], ()
    for split in SPLITS:
        found, names = _prepare_split(root, split, getattr(counts, split), counts.categories)
        labels |= found
        empty = sum(not own for own in found.values())
        lines.append(f"COCO 2014 {split} in {root}: {len(found)} photographs with masks, {empty} of no class")
    write_lines(root / "classes.txt", class_lines(names))
    write_labels(root, labels)
    write_vectors(root, labels, names)
    return [*lines, f"next: afa train --config coco --data.root {root}"]


def _photographs(root: Path, split: str) -> int:
    return sum(path.suffix == ".jpg" for path in (root / "JPEGImages" / split).glob("[!.]*"))


def _take_unpacked(root: Path, split: str) -> None:
    """Photographs that were unpacked as the archive has them, in ``train2014``, stay there: a link leads to them."""
    unpacked, target = root / f"{split}2014", root / "JPEGImages" / split
    if unpacked.is_dir() and not os.path.lexists(target):
        with naming(target, "link", is_not="cannot be made"):
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(Path("..", unpacked.name))


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2014.json"


def _prepare_split(root: Path, split: str, photographs: int, categories: int) -> tuple[dict[str, list[str]], list[str]]:
    """Write masks and list of a split -> labels of its photographs, and names of all classes."""
    path = _annotations(root, split)
    with naming(path, "annotations"):
        content = json.loads(path.read_text(encoding="utf-8"))
        images, kinds = content["images"], sorted(content["categories"], key=lambda item: item["id"])
        number = {item["id"]: place for place, item in enumerate(kinds, 1)}
        names = [item["name"] for item in kinds]
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for item in content["annotations"]:
            of_image[item["image_id"]].append(item)
    if (len(images), len(names)) != (photographs, categories):
        raise DataError(
            f"{path}: {len(images)} photographs of {len(names)} categories, expected {photographs} of {categories}"
        )
    files = [f"JPEGImages/{split}/{item['file_name']}" for item in images]
    problems = [f"{file}: not found" for file in sorted(files) if not (root / file).is_file()]
    if problems:
        raise DataError(f"root {root}: photographs of {split} are missing", problems)

    def convert(image: Mapping[str, Any]) -> None:
        target = root / "SegmentationClass" / split / f"{Path(image['file_name']).stem}.png"
        if not target.is_file():
            with naming(target, "mask", is_not="cannot be made"):
                mask = mask_of(of_image[image["id"]], number, (image["height"], image["width"]))
                with whole(target) as temporary:
                    write_label(temporary, mask)

    in_threads(convert, images, f"masks of {split}")
    labels = {}
    for image in sorted(images, key=lambda item: item["file_name"]):
        shown = {number[item["category_id"]] for item in of_image[image["id"]] if not item.get("iscrowd")}
        labels[Path(image["file_name"]).stem] = [names[place - 1] for place in sorted(shown)]
    write_lines(list_path(root, split), list(labels))
    return labels, names


def mask_of(annotations: Sequence[Mapping[str, Any]], number: Mapping[int, int], size: tuple[int, int]) -> np.ndarray:
    """The mask of a photograph, uint8 [H, W], by the rule above.

    Args:
        annotations: of COCO, with polygons or run-length codes.
        number: category's id -> class.
        size: height and width.
    """
    mask = np.zeros(size, np.uint8)
    shapes = [(item, _pixels(item, size)) for item in annotations]
    from_the_bottom = lambda shape: (not shape[0].get("iscrowd"), -int(shape[1].sum()), shape[0]["id"])
    for item, pixels in sorted(shapes, key=from_the_bottom):
        mask[pixels] = IGNORE if item.get("iscrowd") else number[item["category_id"]]
    return mask


def _pixels(annotation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: where an annotation is."""
    coder, shape = _pycocotools(), annotation["segmentation"]
    if isinstance(shape, list):
        shape = [polygon for polygon in shape if len(polygon) >= 6]
        if not shape:
            return np.zeros(size, bool)
        code = coder.merge(coder.frPyObjects(shape, *size))
    elif isinstance(shape["counts"], list):
        code = coder.frPyObjects(shape, *size)
    else:
        code = shape
    return coder.decode(code).astype(bool)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise DataError("masks of COCO are drawn by pycocotools: pip install 'afa[coco]'") from None
    return mask
