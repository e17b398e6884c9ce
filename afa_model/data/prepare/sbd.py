"""SBD beside VOC 2012 -> the list ``train_aug`` of 10,582 photographs, with masks and image-level labels.

``train_aug`` is VOC's train and SBD's train and val, without VOC's val. A photograph of VOC's train keeps VOC's mask;
the others get SBD's, which has no border of ignored pixels. SBD's photographs are VOC's and are not unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DataError, naming
from ...runtime.progress import in_threads
from ...runtime.writing import whole
from ..files import write_label
from ..texts import lines_of
from .downloads import Archive, obtain, unpack
from .record import write_lines
from .voc import VocCounts, list_path, missing_list, missing_of_voc, names_in, prepare_voc

_INSIDE = "benchmark_RELEASE/dataset"


@dataclass(frozen=True)
class SbdCounts:
    """How many names there are in SBD's lists, and in the list that comes of them."""

    train: int = 8_498
    val: int = 2_857
    train_aug: int = 10_582


def sbd_archive() -> Archive:
    """SBD, where torchvision knows it to be."""
    from torchvision.datasets import SBDataset

    return Archive(SBDataset.filename, SBDataset.url, SBDataset.md5, "1.4 GB")


def prepare_sbd(
    root: str | Path,
    offline: bool = False,
    archive: Archive | None = None,
    counts: SbdCounts | None = None,
    voc: VocCounts | None = None,
) -> list[str]:
    """Make ``train_aug`` in a root in which VOC 2012 is. Returns lines that say what there is.

    A list and masks of ``train_aug`` that were laid there by hand are taken as they are.

    Raises:
        DataError: naming all that is missing, where it is to be had and where to put it.
    """
    root, counts, voc = Path(root).expanduser(), counts or SbdCounts(), voc or VocCounts()
    missing = missing_of_voc(root, voc)
    if missing:
        raise DataError(f"root {root}: VOC 2012 is needed first (afa prepare voc --root {root})", missing)
    if _missing_of_train_aug(root, counts):
        if _missing_of_sbd(root, counts):
            (path,) = obtain([archive or sbd_archive()], root, offline)
            unpack(path, root, {f"{_INSIDE}/{item}": f"SBD/{item}" for item in ("cls", "train.txt", "val.txt")})
            problems = _missing_of_sbd(root, counts)
            if problems:
                raise DataError(f"root {root}: SBD is not complete", problems)
        _write_train_aug(root, counts)
    return prepare_voc(root, offline, counts=voc)


def _missing_of_train_aug(root: Path, counts: SbdCounts) -> list[str]:
    return missing_list(root, "train_aug", counts.train_aug) or [
        f"SegmentationClassAug/{name}.png: not found"
        for name in set(names_in(root, "train_aug")) - set(names_in(root, "train"))
        if not (root / "SegmentationClassAug" / f"{name}.png").is_file()
    ]


def _names_of_sbd(root: Path, split: str) -> list[str]:
    path = root / "SBD" / f"{split}.txt"
    return [text for _, text in lines_of(path)] if path.is_file() else []


def _missing_of_sbd(root: Path, counts: SbdCounts) -> list[str]:
    problems = []
    for split, expected in (("train", counts.train), ("val", counts.val)):
        names = _names_of_sbd(root, split)
        if len(set(names)) != expected:
            problems.append(f"SBD/{split}.txt: {len(set(names))} names, expected {expected}")
        files = [f"SBD/cls/{name}.mat" for name in names]
        problems += [f"{file}: not found" for file in files if not (root / file).is_file()]
    return problems


def _write_train_aug(root: Path, counts: SbdCounts) -> None:
    own = set(names_in(root, "train"))
    names = (own | {*_names_of_sbd(root, "train"), *_names_of_sbd(root, "val")}) - set(names_in(root, "val"))
    if len(names) != counts.train_aug:
        raise DataError(f"root {root}: train_aug would have {len(names)} names, expected {counts.train_aug}")
    lacking = [f"JPEGImages/{name}.jpg: not found" for name in names if not (root / f"JPEGImages/{name}.jpg").is_file()]
    if lacking:
        raise DataError(f"root {root}: photographs of train_aug are missing", sorted(lacking))
    in_threads(lambda name: _convert(root, name), sorted(names - own), "masks of SBD")
    write_lines(list_path(root, "train_aug"), sorted(names))


def _convert(root: Path, name: str) -> None:
    target = root / "SegmentationClassAug" / f"{name}.png"
    if not target.is_file():
        mask = read_sbd_mask(root / "SBD" / "cls" / f"{name}.mat")
        with whole(target) as path:
            write_label(path, mask)


def read_sbd_mask(path: Path) -> np.ndarray:
    """The classes in a mask of SBD, uint8 [H, W], 0..20.

    Raises:
        DataError: it is none, or scipy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("masks of SBD are .mat files, read by scipy: pip install 'afa[coco]'") from None
    with naming(path, "mask"):
        mask = np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
        if mask.ndim != 2 or mask.size == 0 or mask.max() > 20:
            raise ValueError(f"expected classes 0..20 of shape [H, W], got {mask.shape} up to {mask.max(initial=0)}")
        return mask.astype(np.uint8)
