"""COCO as it is published: a folder for each split, lists by any name, grey and CMYK photographs, some of no class."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.voc_factory import make_voc, write_xml

from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import write_label
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError

SMALL = AugmentSettings(crop=32)


def settings(root, **changes) -> DataSettings:
    return DataSettings(root=str(root), num_workers=0, **changes)


def test_cocos_public_layout_opens(tmp_path):
    """Folders of the splits in those of photographs and masks, bare names; grey and CMYK photographs; no class."""
    names = make_voc(tmp_path, count=4, splits=("train", "val"))
    for split, own in (("train", names[:3]), ("val", names[3:])):
        for folder, source, suffix in (
            ("JPEGImages", "JPEGImages", "jpg"),
            ("SegmentationClass", "SegmentationClassAug", "png"),
        ):
            (tmp_path / folder / split).mkdir(parents=True)
            for name in own:
                (tmp_path / source / f"{name}.{suffix}").rename(tmp_path / folder / split / f"{name}.{suffix}")
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(own) + "\n")
    folder = tmp_path / "JPEGImages" / "train"
    for name, mode in zip(names, ("L", "CMYK")):
        with Image.open(folder / f"{name}.jpg") as image:
            image.convert(mode).save(folder / f"{name}.jpg")
    write_label(tmp_path / "SegmentationClass" / "train" / f"{names[2]}.png", np.zeros((48, 66), np.uint8))
    coco = {"mask_dir": "SegmentationClass", "train_split": "train", "val_split": "val"}
    with pytest.raises(DataError, match="empty annotation"):
        TrainingSet(settings(tmp_path, **coco), SMALL)
    dataset = TrainingSet(settings(tmp_path, **coco, allow_empty=True), SMALL)
    assert dataset.labels.sum(1).tolist() == [1, 2, 0]
    assert all(dataset[i]["image"].shape == (3, 32, 32) for i in range(3))
    assert len(EvaluationSet(settings(tmp_path, **coco))) == 1
    # Lists of another name, elsewhere, and with the folder in the names.
    (tmp_path / "part.v2").with_suffix(".v2.txt").write_text(f"{names[3]}\n")
    (tmp_path / "ImageSets" / "Segmentation" / "part.txt").write_text(f"{names[3]}\n")
    (tmp_path / "ImageSets" / "Segmentation" / "inside.txt").write_text(f"val/{names[3]}\n")
    for split in ("part", "inside", str(tmp_path / "part.v2.txt")):
        assert EvaluationSet(settings(tmp_path, **coco | {"val_split": split}))[0]["mask"].shape == (48, 67)


def test_an_annotation_without_an_object_is_background_where_that_is_said(tmp_path):
    names = make_voc(tmp_path, count=2, xml=True)
    write_xml(tmp_path, names[0], [])
    with pytest.raises(DataError, match="empty annotation"):
        TrainingSet(settings(tmp_path, label_source="xml"), SMALL)
    dataset = TrainingSet(settings(tmp_path, label_source="xml", allow_empty=True), SMALL)
    assert dataset.labels.sum(1).tolist() == [0, 2]
