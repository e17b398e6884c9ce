"""A large photograph is labelled band by band, a few classes at a time: with the labels of one piece."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.color_model import ColorModel

from afa_model.data.transforms import normalize
from afa_model.labels import label_maps as maps_module
from afa_model.labels import large
from afa_model.labels.crf import CrfSettings
from afa_model.labels.evidence import MapSettings
from afa_model.labels.kinds import CAM_KINDS, KINDS
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots

CRF = CrfSettings(num_iter=2, pos_w=0.5, bi_w=0.5, bi_xy_std=8, bi_rgb_std=40)
HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=2, dilations=(1, 3), num_iter=2, dense_crf=CRF, bkg_score=0.4)


@pytest.fixture
def in_small_bands(monkeypatch):
    """Every photograph is large, and memory as short as it can be."""
    monkeypatch.setattr(large, "PIXELS", 0)
    monkeypatch.setattr(large, "BAND_VALUES", 700)
    monkeypatch.setattr(large, "REFINED_BYTES", 30_000)
    monkeypatch.setattr(large, "REFINED_CLASSES", 2)


def inputs(size: tuple[int, int], classes: int = 7, present: tuple[int, ...] = (0, 2, 3, 6)):
    """Soft maps that disagree with each other, and the photograph they are of."""
    draw = torch.Generator().manual_seed(3)
    pixels = F.interpolate(torch.rand(1, 3, 9, 8, generator=draw), size, mode="bilinear")
    image = normalize((255 * pixels[0]).to(torch.uint8))[None]
    cam = torch.rand(1, classes, 13, 11, generator=draw)
    affinity = torch.rand(1, 25, 6, 5, generator=draw)
    cls_labels = torch.zeros(1, classes)
    cls_labels[:, list(present)] = 1
    slots = ClassSlots.of(cls_labels)
    return image, slots.pick(cam), affinity, slots


@pytest.mark.parametrize("size", [(61, 83), (64, 50), (31, 120)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "segmentation"])
@pytest.mark.parametrize("refinement", ["par", "crf", "none"])
def test_bands_give_the_labels_of_one_piece(in_small_bands, monkeypatch, size, kind, refinement):
    image, cam, affinity, slots = inputs(size)
    how = dataclasses.replace(HOW, refinement=refinement)
    pieces = large._pieces(size[0] // 2, size[1] // 2, 6, 16 + 4 * 2)
    assert len(pieces) > 1 and pieces[0][0] == 0 and pieces[-1][1] == size[0] // 2
    got = maps_module._labeller(image, size, cam, affinity, slots, how)(kind)
    monkeypatch.setattr(large, "PIXELS", 10**9)
    want = maps_module._labeller(image, size, cam, affinity, slots, how)(kind)
    assert got.dtype == want.dtype == torch.uint8 and got.shape == size
    assert len(want.unique()) > (2 if kind in CAM_KINDS else 1)
    # rounding decides at most between two classes that are equal, as they are in no pixel of these
    assert torch.equal(got, want), (got != want).sum()


@pytest.mark.parametrize("size", [(97, 41), (7, 8), (5, 90)])
def test_the_strongest_of_resized_channels(in_small_bands, size):
    maps = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(1))
    whole = F.interpolate(maps[None], size, mode="bilinear")[0]
    assert torch.equal(large.strongest(maps, size).long(), whole.argmax(0))
    value, index = whole.max(0)
    assert torch.equal(large.strongest(maps, size, 0.5).long(), torch.where(value > 0.5, index + 1, 0))


@pytest.mark.parametrize("refinement", ["par", "crf"])
def test_channels_that_are_not_shown_do_not_shift_the_others(in_small_bands, refinement):
    half = torch.rand(1, 3, 20, 15, generator=torch.Generator().manual_seed(2))
    maps = torch.zeros(4, 20, 15)
    maps[3, :, :7], maps[1, :, 7:] = 1, 1
    how = dataclasses.replace(HOW, refinement=refinement)
    shown = torch.tensor([False, True, False, True])
    label = large._refined(half, (40, 30), lambda channel, rows: maps[channel, rows], shown, how)
    assert label.unique().tolist() == [1, 3] and (label[:, :8] == 3).all() and (label[:, -8:] == 1).all()


def test_every_kind_of_a_whole_model_and_no_class_at_all(in_small_bands, monkeypatch):
    image = inputs((66, 90))[0][0]
    asked = MapSettings(48, (1.0, 0.5))
    for cls_labels in (None, torch.zeros(20)):
        got = label_maps(ColorModel(), image, asked, HOW, cls_labels)
        with monkeypatch.context() as whole:
            whole.setattr(large, "PIXELS", 10**9)
            want = label_maps(ColorModel(), image, asked, HOW, cls_labels)
        assert got.labels.keys() == want.labels.keys() == KINDS.keys()
        for kind in KINDS:
            assert (got.labels[kind] != want.labels[kind]).float().mean() < 1e-3, kind
            assert cls_labels is None or kind == "segmentation" or not got.labels[kind].any()


def test_resized_twice(in_small_bands):
    one = torch.rand(9, 14)
    for aligned in (False, True):
        between = F.interpolate(one[None, None], (31, 40), mode="bilinear")
        want = F.interpolate(between, (17, 12), mode="bilinear", align_corners=aligned)[0, 0]
        got = large._twice(one, (31, 40), (17, 12), aligned=aligned)
        assert torch.allclose(got, want, atol=1e-6)
        assert torch.equal(large._twice(one, (31, 40), (17, 12), aligned=aligned, rows=slice(5, 9)), got[5:9])


def test_what_is_large():
    assert not large.is_large((2000, 2000)) and large.is_large((2001, 2000))
