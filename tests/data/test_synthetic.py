"""The generated data set: the same everywhere, in the layout the loaders read, fit to learn from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from afa_model.data import synthetic_paint
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label
from afa_model.data.synthetic import STAMP, SyntheticSettings, cache_folder, scene, synthetic_data
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError

SMALL = SyntheticSettings(train=6, val=3)


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    return synthetic_data(SMALL, tmp_path_factory.mktemp("synthetic") / "data", show_progress=False)


def test_the_same_bytes_again(small_root, tmp_path):
    again = synthetic_data(SMALL, tmp_path / "again", show_progress=False)
    assert files_of(again) == files_of(small_root)


def test_the_recorded_pictures():
    """The masks of the first pictures have a known checksum; colours may differ in the last bit by platform."""
    digest = hashlib.sha256()
    means = []
    for number in range(12):
        picture, mask = scene(SyntheticSettings(), number)
        digest.update(repr(mask.shape).encode() + mask.tobytes())
        means.append(picture.mean())
    assert digest.hexdigest()[:16] == "be59d905c63e57e3"
    np.testing.assert_allclose(np.mean(means), 145.649, atol=0.01)


def test_a_picture_depends_on_seed_and_number_alone():
    few, many = SyntheticSettings(train=2, val=1), SyntheticSettings(train=50, val=9)
    for first, second in zip(scene(few, 1), scene(many, 1)):
        np.testing.assert_array_equal(first, second)
    other = scene(SyntheticSettings(seed=1), 1)[0]
    assert other.shape != scene(few, 1)[0].shape or (other != scene(few, 1)[0]).any()
    assert not np.array_equal(scene(few, 0)[1], scene(few, 1_000_000)[1])  # training and validation differ


def test_layout_is_read_by_the_loaders(small_root):
    settings = DataSettings(root=str(small_root), train_split="train", num_workers=0)
    training = TrainingSet(settings, AugmentSettings(crop=64))
    validation = EvaluationSet(settings)
    assert (len(training), len(validation)) == (6, 3)
    assert training.class_names == ("background", *synthetic_paint.SPECIES)
    assert training.label_source == "file"
    assert training[0]["image"].shape == (3, 64, 64)
    for index in range(3):
        sample = validation[index]
        assert sample["mask"].shape == sample["image"].shape[1:]
    for index, name in enumerate(training.names):
        mask = read_label(small_root / "SegmentationClassAug" / f"{name}.png")
        present = torch.zeros(len(synthetic_paint.SPECIES))
        present[mask[mask > 0].unique() - 1] = 1
        assert torch.equal(present, training.labels[index])


def test_statistics_of_the_pictures():
    """Several kinds, several animals a picture, enough ground, every kind and coat: what the demo builds on."""
    masks = [scene(SyntheticSettings(), number)[1] for number in range(80)]
    shares = np.array([[(mask == kind).mean() for kind in range(6)] for mask in masks])
    assert (shares[:, 0] > 0.3).all() and (shares[:, 0] < 1).all()
    assert ((shares[:, 1:] > 0).sum(1) == 2).mean() > 0.25  # two kinds in many pictures
    seen = (shares[:, 1:] > 0).mean(0)
    assert (seen > 0.15).all() and (seen < 0.5).all()
    assert 0.1 < shares[:, 1:].sum(1).mean() < 0.45


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (16, 16)])
def test_pictures_of_any_size(size):
    picture, mask = synthetic_paint.paint_scene(np.random.RandomState(3), *size)
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8
    assert mask.shape == size and mask.max() <= len(synthetic_paint.SPECIES)


@pytest.mark.parametrize("kind", synthetic_paint.SPECIES)
def test_heads_tell_kinds_apart_and_bodies_do_not(kind):
    """With everybody in the same coat, the head's colours are still the kind's own."""
    v, u = np.mgrid[-0.7:0.7:141j, -0.7:0.7:141j]
    coat = synthetic_paint.coat_colour(u, v, 0, "plain")
    layers = synthetic_paint.ANIMALS[kind](u, v, coat)
    outline = np.minimum.reduce([distance for distance, _ in layers])
    colour = np.zeros((*u.shape, 3))
    for distance, layer in layers:
        colour = np.where((distance < 0)[..., None], layer, colour)
    inside = outline < 0
    own = inside & (np.abs(colour / np.maximum(colour.max(-1, keepdims=True), 1)
                           - coat / coat.max(-1, keepdims=True)).max(-1) > 0.02)
    assert 0.05 < own.sum() / inside.sum() < 0.45  # the discriminative part is the smaller one
    assert u[own].mean() > u[inside & ~own].mean() or kind == "beetle"  # and mostly in front


def test_second_call_writes_nothing(small_root):
    before = {path: path.stat().st_mtime_ns for path in small_root.rglob("*")}
    assert synthetic_data(SMALL, small_root, show_progress=False) == small_root
    assert {path: path.stat().st_mtime_ns for path in small_root.rglob("*")} == before


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "afa"
    first = synthetic_data(SyntheticSettings(train=1, val=1), show_progress=False)
    other = synthetic_data(SyntheticSettings(train=1, val=1, seed=1), show_progress=False)
    assert first.parent == other.parent == tmp_path / "afa" and first != other
    assert sorted(path.name for path in (tmp_path / "afa").iterdir()) == sorted([first.name, other.name])
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "afa"


def test_a_killed_run_leaves_nothing_that_looks_complete(monkeypatch, tmp_path):
    settings, root = SyntheticSettings(train=3, val=1), tmp_path / "data"

    def killed(settings, number):
        if number == 2:
            raise KeyboardInterrupt
        return scene(settings, number)

    monkeypatch.setattr("afa_model.data.synthetic.scene", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic_data(settings, root, show_progress=False)
    assert not root.exists() and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert json.loads((synthetic_data(settings, root, show_progress=False) / STAMP).read_text())["train"] == 3


def test_a_folder_that_holds_something_else_is_left_alone(small_root, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds something else"):
        synthetic_data(SMALL, tmp_path, show_progress=False)
    with pytest.raises(DataError, match="holds something else"):  # other settings than those it was made with
        synthetic_data(SyntheticSettings(train=7, val=3), small_root, show_progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        synthetic_data(SMALL, tmp_path / "file" / "data", show_progress=False)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"seed": -1}, {"own_coat": 1.5}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticSettings(**wrong)
