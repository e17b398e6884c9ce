"""What is known of a photograph: found in the data set that it lies in, or in the folder that is named."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from support.voc_factory import make_voc

from afa_model.data.beside import Beside, place_of
from afa_model.data.classes import VOC_CLASSES
from afa_model.data.datasets import DataSettings
from afa_model.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=3)
    return folder


def test_a_photograph_is_found_in_its_data_set(root, tmp_path):
    assert place_of(root / "JPEGImages" / "train" / "a.jpg") == (place := place_of(root / "JPEGImages/train/a.png"))
    assert (place.root, place.name) == (root, "train/a")
    assert place_of(tmp_path / "a.jpg") is None
    assert place_of("/x/photos/raw/JPEGImages/a.jpg", "photos/raw").name == "JPEGImages/a"


def test_labels_come_before_masks_and_both_are_those_of_the_data_set(root, tmp_path):
    shutil.copytree(root, tmp_path / "voc")
    path, beside = tmp_path / "voc/JPEGImages/2007_000001.jpg", Beside(VOC_CLASSES)
    known = beside.of(path, (48, 65))
    assert known.source == "mask" and (known.labels.nonzero().flatten() + 1).tolist() == [8, 15]
    assert torch.from_numpy(known.mask.astype(int)).unique().tolist() == [0, 8, 15, 255]
    (tmp_path / "voc" / "cls_labels.json").write_text('{"2007_000001": ["cat"], "2007_000002": ["wolf"]}')
    known = Beside(VOC_CLASSES).of(path)
    assert known.source == "label file" and known.labels.nonzero().tolist() == [[7]] and known.mask is not None
    with pytest.raises(DataError, match=r"2007_000002\.jpg: unknown class 'wolf'"):
        Beside(VOC_CLASSES).of(path.with_name("2007_000002.jpg"))
    assert Beside(VOC_CLASSES).of(path.with_name("2007_000000.jpg")).source == "mask"  # it has no entry
    with pytest.raises(DataError, match=r"2007_000001\.png: 65x48 pixels, its photograph has 65x47"):
        beside.of(path, (47, 65))
    other = Beside(VOC_CLASSES, DataSettings(mask_values={8: 3}))
    assert sorted(np.unique(other.of(path).mask)) == [0, 3, 15, 255]


def test_a_data_set_of_other_classes_is_left_alone(root, capsys):
    names = ("background", "cat", "dog")
    beside = Beside(names)
    assert beside.of(root / "JPEGImages/2007_000001.jpg") == (None, None, "")
    assert f"{root} names other classes than the model has" in capsys.readouterr().err
