"""`afa prepare voc|sbd|coco` on miniature archives in the published layouts: fetched, checked, unpacked, drawn."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.archives import packed

from afa_model import cli
from afa_model.data.classes import COCO_CLASSES, VOC_CLASSES, class_names
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label, write_label
from afa_model.data.prepare.coco import CocoCounts, coco_archives, mask_of, prepare_coco
from afa_model.data.prepare.downloads import Archive
from afa_model.data.prepare.sbd import SbdCounts, prepare_sbd, sbd_archive
from afa_model.data.prepare.voc import VocCounts, prepare_voc, voc_archive
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError

SIZE = 24, 32
NAMES = [f"2007_{number:06d}" for number in range(8)]
TRAIN, VAL = NAMES[:2], NAMES[2:4]  # the others have no mask of VOC's
SHOWN = {name: VOC_CLASSES[1 + place] for place, name in enumerate(NAMES)}
SBD_TRAIN, SBD_VAL = [NAMES[0], NAMES[2], NAMES[4]], [NAMES[3], NAMES[5], NAMES[6]]  # with some of VOC's, of val too
VOC_COUNTS, SBD_COUNTS = VocCounts(2, 2, 8), SbdCounts(3, 3, 5)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def mask_png(value: int) -> bytes:
    mask = Image.new("P", SIZE[::-1], value)
    mask.putpixel((0, 0), 255)
    mask.putpalette(voc_bytes())
    return encoded(mask, "PNG")


def voc_bytes() -> bytes:
    from afa_model.data.classes import voc_palette

    return voc_palette().tobytes()


JPEG = encoded(Image.new("RGB", SIZE[::-1], (90, 120, 40)), "JPEG")


def voc_files() -> dict[str, bytes]:
    files = {f"JPEGImages/{name}.jpg": JPEG for name in NAMES}
    for name, label in SHOWN.items():
        files[f"Annotations/{name}.xml"] = f"<annotation><object><name>{label}</name></object></annotation>".encode()
    files |= {f"SegmentationClass/{name}.png": mask_png(1 + NAMES.index(name)) for name in TRAIN + VAL}
    files |= {f"SegmentationObject/{name}.png": b"" for name in TRAIN}
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        files[f"ImageSets/Segmentation/{split}.txt"] = "".join(f"{name}\n" for name in names).encode()
    return {f"VOCdevkit/VOC2012/{name}": content for name, content in files.items()}


def sbd_files() -> dict[str, bytes]:
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    files = {"img/x.jpg": JPEG, "train.txt": "\n".join(SBD_TRAIN).encode(), "val.txt": "\n".join(SBD_VAL).encode()}
    for name in SBD_TRAIN + SBD_VAL:
        content = np.full(SIZE, 1 + NAMES.index(name), np.uint8)
        file = io.BytesIO()
        kind = [("Segmentation", object), ("CategoriesPresent", object)]
        scipy_io.savemat(file, {"GTcls": np.array([[(content, np.array([1]))]], dtype=kind)})
        files[f"cls/{name}.mat"] = file.getvalue()
    return {f"benchmark_RELEASE/dataset/{name}": content for name, content in files.items()}


@pytest.fixture
def voc(tmp_path):
    """A root in which the archive of VOC was laid, and the archive."""
    return tmp_path / "VOC", packed(tmp_path / "VOC" / "downloads" / "voc.tar", voc_files())


@pytest.fixture
def sbd(voc):
    """The same prepared, with the archive of SBD beside the root."""
    root, archive = voc
    prepare_voc(root, True, archive, VOC_COUNTS)
    return root, packed(root.parent / "sbd.tgz", sbd_files())


def names_in(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


# --- VOC and SBD ------------------------------------------------------------------------------------------------------


def test_what_is_to_be_had_is_what_torchvision_knows():
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    known = DATASET_YEAR_DICT["2012"]
    assert (voc_archive().url, voc_archive().md5) == (known["url"], known["md5"])
    assert (sbd_archive().url, sbd_archive().md5) == (SBDataset.url, SBDataset.md5)
    assert all(len(archive.md5) == 32 and archive.url.endswith(archive.name) for archive in coco_archives().values())


def test_voc_and_sbd_become_train_aug(sbd):
    root, archive = sbd
    settings = DataSettings(root=str(root), num_workers=0)
    assert len(EvaluationSet(settings)) == 2
    assert not (root / "SegmentationObject").exists()
    shutil.rmtree(root / "SegmentationClassAug")  # as where the archive was unpacked by hand
    lines = prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    assert any("5 photographs in train_aug" in line for line in lines)
    assert names_in(root, "train_aug") == [*TRAIN, *NAMES[4:7]], "VOC's train and SBD's, without VOC's val"
    assert not (root / "SBD" / "img").exists()
    dataset = TrainingSet(settings, AugmentSettings(crop=16))
    assert dataset.label_source == "file" and dataset.class_names == VOC_CLASSES
    assert [VOC_CLASSES[1 + int(row.argmax())] for row in dataset.labels] == [SHOWN[name] for name in dataset.names]
    masks = {name: read_label(root / "SegmentationClassAug" / f"{name}.png") for name in dataset.names}
    assert masks[NAMES[0]][0, 0] == 255, "VOC's own mask, though SBD has one"
    assert (masks[NAMES[4]] == 5).all() and (masks[NAMES[6]] == 7).all()
    table = np.load(root / "cls_labels_onehot.npy", allow_pickle=True).item()
    assert set(table) == {*TRAIN, *VAL, *NAMES[4:7]} and table[NAMES[4]].shape == (20,) and table[NAMES[4]][4] == 1
    assert json.loads((root / "cls_labels.json").read_text())[NAMES[4]] == [VOC_CLASSES[5]]
    masks_only = TrainingSet(replace(settings, label_source="masks"), AugmentSettings(crop=16))
    assert (masks_only.labels == dataset.labels).all()


def test_running_again_needs_no_archive_and_changes_nothing(sbd):
    root, archive = sbd
    prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*") if path.is_file()}
    (root / "downloads" / "voc.tar").rename(root.parent / "away.tar")
    (root.parent / "sbd.tgz").unlink()
    prepare_sbd(root, True, counts=SBD_COUNTS, voc=VOC_COUNTS)
    prepare_voc(root, True, counts=VOC_COUNTS)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*") if path.is_file()}
    assert {path: state for path, state in before.items() if path.name != "voc.tar"} == after


def test_what_is_missing_is_listed_with_where_it_is_to_be_had_and_where_to_put_it(tmp_path, capsys):
    root = tmp_path / "data"
    archive = voc_archive()
    assert cli.main(["prepare", "voc", "--root", str(root), "--offline"]) == 2
    target = root / "downloads" / archive.name
    told = capsys.readouterr().err
    assert told.startswith(f"afa prepare voc: error: root {root}: an archive is missing")
    assert f"{target}: not found; get it from {archive.url} (2 GB) and put it at {target}" in told
    assert cli.main(["prepare", "coco", "--root", str(root), "--offline"]) == 2
    told = capsys.readouterr().err
    assert "3 of 3 archives are missing" in told
    assert all(each.url in told and str(root / "downloads" / each.name) in told for each in coco_archives().values())
    assert cli.main(["prepare", "sbd", "--root", str(root), "--offline"]) == 2
    told = capsys.readouterr().err
    assert f"VOC 2012 is needed first (afa prepare voc --root {root})" in told
    assert "ImageSets/Segmentation/train.txt: not found" in told


def test_a_damaged_archive_is_told_and_kept(voc):
    root, archive = voc
    path = root / "downloads" / archive.name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged or cut off: its MD5 is"):
        prepare_voc(root, True, archive, VOC_COUNTS)
    assert path.exists() and not (root / "JPEGImages").exists()
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"archive .*voc.tar cannot be unpacked"):
        prepare_voc(root, True, replace(archive, md5=hashlib.md5(b"no archive").hexdigest()), VOC_COUNTS)


def test_counts_and_names_that_do_not_fit_are_told(sbd, tmp_path):
    root, archive = sbd
    with pytest.raises(DataError, match=r"(?s)VOC 2012 is not complete.*train.txt: 2 names, expected 3"):
        prepare_voc(root, True, replace(archive, name="voc.tar", md5=_md5(root)), VocCounts(3, 2, 8))
    (root / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()
    (root / "Annotations" / f"{VAL[0]}.xml").unlink()
    with pytest.raises(DataError) as error:
        prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    assert error.value.problems == [
        f"SegmentationClass/{TRAIN[0]}.png: not found",
        f"Annotations/{VAL[0]}.xml: not found",
    ]
    prepare_voc(root, True, Archive("voc.tar", "", _md5(root)), VOC_COUNTS)  # out of the archive again
    with pytest.raises(DataError, match="train_aug would have 5 names, expected 6"):
        prepare_sbd(root, True, archive, SbdCounts(3, 3, 6), VOC_COUNTS)
    with pytest.raises(DataError, match=r"(?s)SBD is not complete.*SBD/val.txt: 3 names, expected 4"):
        prepare_sbd(root, True, archive, SbdCounts(3, 4, 6), VOC_COUNTS)
    (root / "JPEGImages" / f"{NAMES[7]}.jpg").unlink()
    (root / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    assert error.value.problems[0] == "JPEGImages: 7 photographs, expected 8"
    assert "is that the root" in error.value.problems[1]


def _md5(root: Path) -> str:
    return hashlib.md5((root / "downloads" / "voc.tar").read_bytes()).hexdigest()


def test_masks_of_train_aug_that_were_laid_there_by_hand_do(sbd):
    root, archive = sbd
    (root.parent / "sbd.tgz").unlink()
    names = [*TRAIN, *NAMES[4:7]]
    (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n".join(names))
    for name in names[2:4]:
        write_label(root / "SegmentationClassAug" / f"{name}.png", np.ones(SIZE, np.uint8))
    with pytest.raises(DataError, match=r"sbd.tgz: not found; get it from"):  # of one mask there is none
        prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    write_label(root / "SegmentationClassAug" / f"{names[4]}.png", np.ones(SIZE, np.uint8))
    prepare_sbd(root, True, archive, SBD_COUNTS, VOC_COUNTS)
    assert NAMES[6] in json.loads((root / "cls_labels.json").read_text())


# --- COCO -------------------------------------------------------------------------------------------------------------

KINDS = [{"id": key, "name": name} for key, name in ((90, "toothbrush"), (1, "person"), (18, "dog"))]
NUMBER = {1: 1, 18: 2, 90: 3}


def box(key: int, kind: int, x: int, y: int, side: int, image: int = 0, **more) -> dict:
    polygon = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    return {"id": key, "image_id": image, "category_id": kind, "segmentation": polygon, "iscrowd": 0, **more}


def rle(key: int, kind: int, rows: slice, image: int = 0, **more) -> dict:
    mask = np.zeros(SIZE, np.uint8)
    mask[rows] = 1
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {**box(key, kind, 0, 0, 0, image), "segmentation": {"counts": counts, "size": list(SIZE)}, **more}


def test_of_annotations_that_overlap_the_smaller_is_on_top_and_crowds_are_below():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    crowd = rle(1, 1, slice(4, 6), iscrowd=1)  # of fewer pixels than the large one
    small, large = box(2, 90, 4, 4, 4), box(3, 18, 2, 2, 16)
    empty = {**box(4, 1, 0, 0, 1), "segmentation": [[1, 1, 2, 2]]}
    mask = mask_of([small, large, crowd, empty], NUMBER, SIZE)
    assert (mask[5:7, 5:7] == 3).all() and (mask[14:17, 4:16] == 2).all()
    assert mask[4, 0] == 255 and mask[5, 31] == 255 and mask[6, 31] == 0 and (mask[4:6, 9:17] == 2).all()
    assert (mask == mask_of([large, empty, crowd, small], NUMBER, SIZE)).all(), "whatever their order"
    first, second = box(7, 1, 4, 4, 6), box(8, 18, 4, 4, 6)
    assert mask_of([second, first], NUMBER, SIZE)[6, 6] == 2, "of as many pixels the one of the higher id"


@pytest.fixture
def coco(tmp_path):
    """A root, the archives laid there, and what they hold."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    root, archives, annotations = tmp_path / "COCO", {}, {}
    rows = {
        "train": [box(1, 18, 2, 2, 9, 0), box(2, 1, 1, 1, 3, 0), rle(3, 90, slice(0, 5), 1, iscrowd=1)],
        "val": [box(4, 90, 2, 2, 9, 0)],
    }
    for split, count in (("train", 3), ("val", 1)):
        files = [f"COCO_{split}2014_{key:012d}.jpg" for key in range(count)]
        images = [{"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(files)]
        content = {"images": images, "annotations": rows[split], "categories": KINDS}
        annotations[f"annotations/instances_{split}2014.json"] = json.dumps(content).encode()
        annotations[f"annotations/captions_{split}2014.json"] = b"{}"
        folder = root / "downloads"
        archives[split] = packed(folder / f"{split}2014.zip", {f"{split}2014/{name}": JPEG for name in files})
    archives["annotations"] = packed(root / "downloads" / "annotations.zip", annotations)
    return root, archives


def test_coco_becomes_what_its_configuration_opens(coco):
    root, archives = coco
    counts = CocoCounts(3, 1, 3)
    lines = prepare_coco(root, True, archives, counts)
    assert "3 photographs with masks, 2 of no class" in lines[0]
    assert class_names(root) == ("background", "person", "dog", "toothbrush"), "by id, not by name or as listed"
    assert not (root / "annotations" / "captions_train2014.json").exists()
    own = {"mask_dir": "SegmentationClass", "train_split": "train", "num_workers": 0}
    settings = DataSettings(root=str(root), **own, allow_empty=True)
    dataset = TrainingSet(settings, AugmentSettings(crop=16))
    assert dataset.label_source == "file" and dataset.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    mask = EvaluationSet(settings)[0]["mask"]
    assert mask[6, 6] == 3 and mask[0, 0] == 0
    mask = read_label(root / "SegmentationClass" / "train" / "COCO_train2014_000000000001.png")
    assert mask[4, 4] == 255 and mask[5, 4] == 0
    for path in (root / "downloads").iterdir():
        path.unlink()
    states = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert prepare_coco(root, True, archives, counts) == lines
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.png")} == states
    with pytest.raises(DataError, match="3 photographs of 3 categories, expected 3 of 4"):
        prepare_coco(root, True, archives, CocoCounts(3, 1, 4))
    with pytest.raises(DataError, match=r"train2014.zip: not found; get it from"):
        prepare_coco(root, True, archives, CocoCounts(4, 1, 3))
    (root / "JPEGImages" / "train" / "COCO_train2014_000000000001.jpg").rename(root / "JPEGImages" / "train" / "x.jpg")
    with pytest.raises(DataError, match=r"(?s)photographs of train are missing.*000000000001.jpg: not found"):
        prepare_coco(root, True, archives, counts)


def test_the_ids_of_coco_in_ascending_order_are_the_classes():
    """The 80 ids leave out 10 of 1..90; the first, some around the gaps, and the last."""
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    number = {key: place for place, key in enumerate((key for key in range(1, 91) if key not in gaps), 1)}
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 44: "bottle", 46: "wine glass", 67: "dining table",
             70: "toilet", 72: "tv", 84: "book", 90: "toothbrush"}  # fmt: skip
    assert {key: COCO_CLASSES[number[key]] for key in known} == known and len(number) == CocoCounts().categories
