"""The dense CRF as a refinement of labels and after the segmentation: published settings, slots, stacks, sizes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support.common import relative_error

from afa_kernels import dense_crf
from afa_model.data.transforms import normalize
from afa_model.labels import crf as module
from afa_model.labels.crf import CrfSettings, crf, crf_size
from afa_model.labels.label_maps import crf_label
from afa_model.labels.pseudo_labels import labels_of_one_diffusion, refine_label
from afa_model.labels.refinement import reach, refine
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots
from afa_model.runtime.notices import forget_notices

OWN = CrfSettings(2, 1.5, 2.0, 2.5, 9.0, 40.0)
HOW = LabelSettings(refinement="crf", dense_crf=OWN)


def by_hand(image01, probs, xy: float = 1.0, settings: CrfSettings = OWN):
    num_iter, pos_w, pos_xy, bi_w, bi_xy, rgb = dataclasses.astuple(settings)
    return dense_crf(255 * image01, probs, num_iter, pos_w, pos_xy * xy, bi_w, bi_xy * xy, rgb)


def inputs(rng, height=14, width=18):
    """Photographs, and two stacks of four channels of which each image shows others."""
    images01 = torch.rand(2, 3, height, width, generator=rng)
    shown = torch.tensor([[True, False, True, True], [True, True, False, False]])
    maps = torch.rand(2, 2, 4, height, width, generator=rng) * shown[:, None, :, None, None]
    return images01, maps, shown


def test_the_defaults_are_the_published_ones():
    assert dataclasses.astuple(CrfSettings()) == (10, 3, 3, 4, 64, 5)
    assert LabelSettings().dense_crf == CrfSettings()


def test_each_stack_of_each_image_is_refined_among_the_classes_it_shows(rng):
    images01, maps, shown = inputs(rng)
    got = refine(images01, maps.flatten(1, 2), shown, HOW).view_as(maps)
    for b in range(2):
        for stack in range(2):
            own = maps[b, stack, shown[b]]
            want = by_hand(images01[b : b + 1], (own / own.sum(0))[None])[0]
            assert torch.equal(got[b, stack, shown[b]], want)
    assert not got[~shown[:, None].expand(2, 2, 4)].any()
    torch.testing.assert_close(got.sum(2), torch.ones_like(got[:, :, 0]))


def test_maps_of_another_size_are_resized_as_for_the_other_refinements(rng):
    images01, maps, shown = inputs(rng)
    small = maps.flatten(1, 2)[..., ::2, ::3]
    got = refine(images01, small, shown, HOW)
    for aligned in (True, False):
        large = F.interpolate(small, images01.shape[2:], mode="bilinear", align_corners=aligned)
        assert (relative_error(got, refine(images01, large, shown, HOW)) < 1e-5) is aligned


def test_how_far_a_refinement_reaches():
    assert reach(HOW) is None
    assert reach(LabelSettings(refinement="none")) == 0
    assert reach(LabelSettings(refinement="par", dilations=(1, 5), num_iter=3)) == 15


def test_labels_of_two_scores_and_of_one_refinement_for_both(rng):
    images01, cam = torch.rand(2, 3, 24, 20, generator=rng), torch.rand(2, 3, 24, 20, generator=rng)
    slots = ClassSlots.of(torch.tensor([[1, 0, 1], [0, 1, 0]]))
    cam = slots.pick(cam)
    label = refine_label(images01, cam, slots, HOW, (0.3, 0.7))
    for score, wins in ((0.3, lambda one: (label == 0) == (one == 0)), (0.7, lambda one: (label == one) | (one == 0))):
        assert wins(refine_label(images01, cam, slots, HOW, (score,))).all(), score
    assert set(label[0].unique().tolist()) <= {0, 1, 3, 255} and set(label[1].unique().tolist()) <= {0, 2, 255}
    unrefined = dataclasses.replace(HOW, refinement="none")
    assert not torch.equal(label, refine_label(images01, cam, slots, unrefined, (0.3, 0.7)))
    walked = torch.rand(2, 2 * (1 + cam.shape[1]), 6, 5, generator=rng)
    assert torch.equal(labels_of_one_diffusion(images01, walked, cam, slots, HOW, (0.3, 0.7))[0], label)


# sizes


def test_a_photograph_goes_through_whole_while_memory_allows():
    for size, classes in (((480, 640), 81), ((1000, 1500), 21), ((1200, 2000), 4)):
        assert crf_size(size, classes) == size
    for size, classes in (((1000, 1600), 21), ((900, 1600), 81), ((3000, 4000), 21), ((6000, 9000), 4)):
        small = crf_size(size, classes)
        assert small[0] / size[0] == pytest.approx(small[1] / size[1], rel=0.01) and small < size
        # a sixteenth channel more costs nothing, and as much memory is used as there may be
        assert small == crf_size(size, -(-classes // 16) * 16) > crf_size(size, -(-classes // 16) * 16 + 1)
        assert crf_size([side + 8 for side in small], classes) != tuple(side + 8 for side in small)
    assert crf_size((1, 10**9), 21)[0] == 1


def test_of_a_smaller_photograph_the_deviations_of_place_are_smaller(rng, monkeypatch, capsys):
    monkeypatch.setattr(module, "MOST_BYTES", 14 * 18 * (250 + 24 * 16) / 4)
    forget_notices()
    images01, probs = torch.rand(1, 3, 14, 18, generator=rng), torch.rand(1, 3, 7, 9, generator=rng).softmax(1)
    assert crf_size((14, 18), 3) == (7, 9)
    small = F.interpolate(images01, (7, 9), mode="bilinear", antialias=True)
    want = by_hand(small, probs, 0.5)
    for got in (crf(images01, probs, OWN), crf(small, probs, OWN, (14, 18))):
        assert relative_error(got, want) < 1e-6
    assert relative_error(crf(small, probs, OWN), want) > 1e-3
    told = capsys.readouterr().err
    assert told.count("afa: note: the dense CRF of 18x14 pixels and 3 classes would take more than") == 1
    assert "it is made at 9x7" in told
    maps = torch.rand(1, 3, 14, 18, generator=rng)
    assert refine(images01, maps, torch.ones(1, 3, dtype=torch.bool), HOW).shape == (1, 3, 7, 9)
    logits = 3 * torch.randn(1, 3, 4, 5, generator=rng)
    photo = (255 * images01).to(torch.uint8)
    small = F.interpolate(photo / 255, (7, 9), mode="bilinear", antialias=True)
    label = crf_label(normalize(photo), logits, OWN)
    for xy in (0.5, 1.0):
        probs = F.interpolate(logits, (7, 9), mode="bilinear").softmax(1)
        want = F.interpolate(by_hand(small, probs, xy), (14, 18), mode="bilinear")[0].argmax(0)
        assert torch.equal(label.long(), want) is (xy == 0.5)


def test_the_segmentation_is_decided_after_the_crf_at_the_photographs_size(rng):
    photo = (255 * torch.rand(1, 3, 14, 18, generator=rng)).to(torch.uint8)
    logits = 2 * torch.randn(1, 5, 4, 5, generator=rng)
    probs = F.interpolate(logits, (14, 18), mode="bilinear").softmax(1)
    want = by_hand(photo / 255, probs)[0].argmax(0)
    assert torch.equal(crf_label(normalize(photo), logits, OWN).long(), want)
    assert not torch.equal(want, probs[0].argmax(0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_iter": -1}, "num_iter: expected at least 0, got -1"),
        ({"pos_w": -1.0}, "pos_w: expected at least 0, got -1.0"),
        ({"bi_w": math.inf}, "bi_w: expected at least 0, got inf"),
        ({"pos_xy_std": 0.0}, "pos_xy_std: expected a positive number, got 0.0"),
        ({"bi_xy_std": math.nan}, "bi_xy_std: expected a positive number, got nan"),
        ({"bi_rgb_std": -5.0}, "bi_rgb_std: expected a positive number, got -5.0"),
    ],
)
def test_bad_settings_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        CrfSettings(**change)
    settings = CrfSettings()
    vars(settings).update(change)
    with pytest.raises(ValueError, match=rf"dense_crf\.{said}"):
        LabelSettings(dense_crf=settings)
