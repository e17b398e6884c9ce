"""Files of a data set in VOC layout: where they lie, how they are read and written, names of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

IGNORE = 255  # mask value of pixels that take no part in any score or loss

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

COCO_CLASSES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse",
    "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie",
    "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse",
    "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_KNOWN_CLASSES = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}


class DataError(Exception):
    """What is wrong with a data set, all of it: ``problems`` is a list of lines, each naming a file."""

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.problems = list(problems)
        super().__init__("\n  ".join([what, *self.problems]))


def class_names(dataset: object, num_classes: int | None = None) -> tuple[str, ...]:
    """Names of the classes, background first.

    Args:
        dataset: ``"voc"`` (21 names), ``"coco"`` (81), a data set with an attribute ``class_names``, or the
            root folder of one. A folder's ``classes.txt`` (one name a line, the background first or left out)
            decides; a folder without it has VOC's names if ``num_classes`` is 21 or None and COCO's if it is
            81.
        num_classes: number of classes, the background counted; checked against the names where both are
            known.

    Raises:
        DataError: no names are known for this many classes, or ``classes.txt`` holds another number of them.
    """
    if hasattr(dataset, "class_names"):
        names = tuple(dataset.class_names)
        source = type(dataset).__name__
    elif isinstance(dataset, str) and dataset in _KNOWN_CLASSES:
        names, source = _KNOWN_CLASSES[dataset], dataset
    else:
        path = Path(str(dataset)) / "classes.txt"
        if path.is_file():
            names, source = _read_class_file(path), str(path)
        else:
            known = {len(value): value for value in _KNOWN_CLASSES.values()}
            names, source = known.get(num_classes or len(VOC_CLASSES), ()), str(dataset)
            if not names:
                raise DataError(
                    f"no class names for num_classes={num_classes}: write them to {path}, one a line"
                )
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"num_classes is {num_classes} but {source} names {len(names)} classes (background counted)"
        )
    return names


def _read_class_file(path: Path) -> tuple[str, ...]:
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or names[0] != "background":
        names.insert(0, "background")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles or not 2 <= len(names) <= IGNORE:
        raise DataError(
            f"{path}: " + (f"named twice: {', '.join(doubles)}" if doubles else f"{len(names)} classes")
        )
    return tuple(names)


def voc_palette(size: int = 256) -> np.ndarray:
    """The VOC colour map, uint8 [size, 3]: the bits of an index, spread over the high bits of red, green and
    blue.
    """
    index = np.arange(size)
    palette = np.zeros((size, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_split(root: str | Path, split: str, list_dir: str = "ImageSets/Segmentation") -> list[str]:
    """Image names of a list file: ``<root>/<list_dir>/<split>.txt``, or the file ``split`` itself if it is a
    path.

    A line is a name (``2007_000032``, with sub-folders if there are any: ``train2014/x``) or, as in some
    lists of the field, the paths of the photograph and of its mask (``/JPEGImages/a.jpg
    /SegmentationClassAug/a.png``).

    Raises:
        DataError: root or list missing (the lists that exist are named), the list empty, or names that occur
            twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder")
    candidates = [root / list_dir / f"{split}.txt", Path(split), root / split]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        there = ", ".join(sorted(file.stem for file in (root / list_dir).glob("*.txt"))) or "none"
        raise DataError(f"split {split!r}: {candidates[0]} not found (lists there: {there})")
    names = [_name_of_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} lists no images")
    seen: set[str] = set()
    doubles = [name for name in names if name in seen or seen.add(name)]
    if doubles:
        raise DataError(f"{path}: {len(doubles)} names are listed twice", doubles)
    return names


def _name_of_line(line: str) -> str:
    entry = line.split()[0]
    if entry.endswith(IMAGE_SUFFIXES):
        entry = entry.rsplit(".", 1)[0]
        # the first folder of a path from the data root is the image folder, which the settings name already
        entry = entry.lstrip("/").split("/", 1)[-1]
    return entry


def find_image(folder: str | Path, name: str) -> Path | None:
    """The photograph ``name`` in ``folder`` whatever its suffix, or None."""
    base = os.path.join(folder, name)
    return next((Path(base + suffix) for suffix in IMAGE_SUFFIXES if os.path.isfile(base + suffix)), None)


def read_photo(path: str | Path, upright: bool = False) -> tv_tensors.Image:
    """A photograph as uint8 [3, H, W], 0..255, RGB (grey and CMYK are converted).

    Args:
        upright: turn it as its EXIF orientation says. Off for data sets: their masks follow the stored
            pixels.
    """
    with Image.open(path) as image:
        rgb = (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    return tv_tensors.Image(torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous())


def read_label(path: str | Path) -> torch.Tensor:
    """A mask as int64 [H, W]: the raw index of a palette or grey PNG, never its colours.

    Raises:
        ValueError: the file holds colours (or 16 bits) instead of indices.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(
                f"{path}: a mask holds class indices (image mode P or L), this one is {image.mode}"
            )
        return torch.from_numpy(np.array(image)).long()


def values_in(mask: Image.Image) -> list[int]:
    """The values that occur in a mask of mode P or L, sorted."""
    return np.flatnonzero(np.bincount(np.asarray(mask).ravel(), minlength=256)).tolist()


def outside_classes(values: Sequence[int], num_classes: int) -> str | None:
    """What is wrong with mask values that are neither a class nor 255, or None."""
    wrong = [value for value in values if num_classes <= value != IGNORE]
    if not wrong:
        return None
    listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return f"label {listed} outside 0..{num_classes - 1} and {IGNORE}"


def write_label(path: str | Path, label: torch.Tensor | np.ndarray) -> None:
    """Write a label [H, W] of indices 0..255 as a PNG of mode P with the VOC palette; the folder is made if
    need be.
    """
    array = np.asarray(label)
    if array.ndim != 2 or array.size == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError(f"label: expected [H, W] with values 0..255, got {array.shape} {array.dtype}")
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
