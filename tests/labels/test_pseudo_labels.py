"""Pseudo-labels: recorded numbers, thresholds, the photograph's box, the random walk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import DEVICE

from afa_kernels import par, random_walk_with_background
from afa_model.conventions import IGNORE
from afa_model.labels.pseudo_labels import cam_to_label, random_walk_label, refine_label
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots

HOW = LabelSettings(radius=2)
BOTH = HOW.scores
BOX = torch.tensor([[0, 40, 6, 52], [5, 37, 0, 56]])


@pytest.fixture
def case(rng):
    """Two images with smooth CAMs of five classes; the first shows classes 1 and 4, the second class 3."""
    images = F.interpolate(torch.rand(2, 3, 10, 14, generator=rng), (40, 56), mode="bilinear")
    cam = F.interpolate(torch.rand(2, 5, 5, 7, generator=rng), (40, 56), mode="bilinear")
    cam = (cam - cam.amin((2, 3), keepdim=True)) / (cam.amax((2, 3), keepdim=True) + 1e-5)
    cls_labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    affinity = torch.rand(2, 25, 5, 7, generator=rng)
    return images, cam, cls_labels, affinity


@pytest.fixture
def recorded(golden):
    numbers = {name: torch.from_numpy(value) for name, value in golden("pseudo_label").items() if value.ndim}
    return {name: value if name == "img_box" else value.to(DEVICE) for name, value in numbers.items()}


def disagreement(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.dtype == torch.int64 and got.shape == want.shape
    return float((got != want.long()).double().mean())


def test_plain_labels_match_recorded_numbers(recorded):
    slots, box = ClassSlots.of(recorded["cls_labels"]), recorded["img_box"]
    cam = slots.pick(recorded["cams"])
    assert disagreement(cam_to_label(cam, slots, (0.45,)), recorded["label_plain"]) < 1e-3
    got = cam_to_label(cam, slots, (0.35, 0.55), box)
    assert disagreement(got, recorded["label_with_ignore"]) < 1e-3


def test_refined_label_matches_recorded_numbers(recorded):
    slots = ClassSlots.of(recorded["cls_labels"])
    cam = slots.pick(recorded["cams"])
    got = refine_label(recorded["images"], cam, slots, HOW, (0.35, 0.55), recorded["img_box"])
    assert disagreement(got, recorded["refined_label"]) < 1e-3


def test_refinement_inside_the_box_matches_recorded_numbers(recorded):
    """Half-size image of the box, CAMs at its size, result resized back: what the random-walk label does."""
    want = recorded["refined_cams"]
    for i, (y0, y1, x0, x1) in enumerate(recorded["img_box"].tolist()):
        image = recorded["images"][i : i + 1, :, y0:y1, x0:x1]
        half = F.interpolate(image, ((y1 - y0) // 2, (x1 - x0) // 2), mode="bilinear")
        got = par(half, recorded["cams_with_bkg"][i : i + 1, :, y0:y1, x0:x1])
        got = F.interpolate(got, (y1 - y0, x1 - x0), mode="bilinear")
        part = want[i : i + 1, :, y0:y1, x0:x1]
        assert (got - part).norm() < 1e-5 * part.norm()


def labels_of(case, box=BOX, scores=BOTH):
    images, cam, cls_labels, affinity = case
    slots = ClassSlots.of(cls_labels)
    cam = slots.pick(cam)
    common = cam, slots, HOW, scores, box
    return {
        "refined": refine_label(images, *common),
        "walked": random_walk_label(images, affinity, *common),
        "unrefined": random_walk_label(images, affinity, *common, refined=False),
    }


def walked_label(images, affinity, cam, cls_labels, box=None, scores=BOTH, **options):
    slots = ClassSlots.of(cls_labels)
    return random_walk_label(images, affinity, slots.pick(cam), slots, HOW, scores, box, **options)


def test_labels_hold_present_classes_inside_the_box_only(case):
    for label in labels_of(case).values():
        assert label.shape == (2, 40, 56) and label.dtype == torch.int64
        assert set(label[0].unique().tolist()) <= {0, 1, 4, IGNORE}
        assert set(label[1].unique().tolist()) <= {0, 3, IGNORE}
        for i, (y0, y1, x0, x1) in enumerate(BOX.tolist()):
            outside = torch.ones(40, 56, dtype=torch.bool)
            outside[y0:y1, x0:x1] = False
            assert (label[i][outside] == IGNORE).all()
            assert (label[i][~outside] != IGNORE).any()


def test_two_scores_agree_with_one_at_a_time(case):
    """Foreground is what the high score leaves, background what the low one does; the rest is open."""
    both = labels_of(case, scores=(0.3, 0.5))
    high = labels_of(case, scores=(0.5,))
    low = labels_of(case, scores=(0.3,))
    for kind, label in both.items():
        want = torch.where(high[kind] > 0, high[kind], torch.where(low[kind] > 0, IGNORE, 0))
        inside = high[kind] != IGNORE
        assert torch.equal(label[inside], want[inside])
        assert (label[inside] == IGNORE).any(), "the scores should leave something open in this case"


def test_labels_of_a_batch_are_labels_of_its_images(case):
    images, cam, cls_labels, affinity = case
    whole = labels_of(case)
    for i in range(2):
        one = slice(i, i + 1)
        alone = labels_of((images[one], cam[one], cls_labels[one], affinity[one]), BOX[one])
        for kind, label in alone.items():
            assert disagreement(whole[kind][one], label) < 1e-3


def test_the_walk_is_refined_inside_the_box_at_half_its_size(case):
    """The published way, step by step: from full resolution, no antialiasing anywhere."""
    images, cam, cls_labels, affinity = case
    small = F.interpolate(cam, (5, 7), mode="bilinear")
    walked = random_walk_with_background(affinity, small, cls_labels, 0.4, 2, 2.0, 0.1)
    walked = F.interpolate(walked, (40, 56), mode="bilinear")
    got = walked_label(images, affinity, cam, cls_labels, BOX, (0.4,))
    for i, (y0, y1, x0, x1) in enumerate(BOX.tolist()):
        inside, size = (slice(i, i + 1), ..., slice(y0, y1), slice(x0, x1)), (y1 - y0, x1 - x0)
        half = F.interpolate(images[inside], (size[0] // 2, size[1] // 2), mode="bilinear")
        refined = F.interpolate(par(half, walked[inside]), size, mode="bilinear")
        assert disagreement(got[inside], refined.argmax(1)) < 1e-3


def test_padding_has_no_say_in_the_random_walk_refinement(case):
    images, cam, cls_labels, affinity = case
    want = walked_label(images, affinity, cam, cls_labels, BOX)
    painted = images.clone()
    for i, (y0, y1, x0, x1) in enumerate(BOX.tolist()):
        painted[i] = 0.5
        painted[i, :, y0:y1, x0:x1] = images[i, :, y0:y1, x0:x1]
    assert torch.equal(walked_label(painted, affinity, cam, cls_labels, BOX), want)


def test_walk_along_no_affinity_keeps_the_cam(case):
    images, cam, cls_labels, affinity = case
    itself = torch.zeros_like(affinity)
    itself[:, 12] = 1  # the centre of the 5 x 5 window
    small = F.interpolate(cam, (5, 7), mode="bilinear")
    got, slots = walked_label(images, itself, small, cls_labels, None, (0.4,), refined=False), ClassSlots.of(cls_labels)
    assert torch.equal(got, cam_to_label(slots.pick(small), slots, (0.4,)))


def test_image_without_any_class_is_background(case):
    images, cam, _, affinity = case
    for label in labels_of((images, cam, torch.zeros(2, 5), affinity), box=None).values():
        assert not label.any()


def test_integer_and_bool_class_labels_do(case):
    images, cam, cls_labels, affinity = case
    want = labels_of(case)
    for dtype in (torch.bool, torch.int64):
        got = labels_of((images, cam, cls_labels.to(dtype), affinity))
        assert all(torch.equal(got[kind], want[kind]) for kind in want)


def test_wrong_arguments_are_named(case):
    images, cam, cls_labels, affinity = case
    slots = ClassSlots.of(cls_labels)
    with pytest.raises(ValueError, match="cam: expected"):
        refine_label(images, cam, slots, HOW, BOTH)
    with pytest.raises(ValueError, match="img_box"):
        cam_to_label(slots.pick(cam), slots, BOTH, BOX[:1])
    for scores in ((0.5, 0.3), (), (-0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="scores"):
            random_walk_label(images, affinity, slots.pick(cam), slots, HOW, scores, BOX)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cam_scales": ()}, {"cam_scales": (1.0, 0.0)}, {"radius": -1}, {"walk_power": 0.0}, {"walk_eps": -0.1},
        {"refinement": "crf2"}, {"dilations": ()}, {"dilations": (0,)}, {"num_iter": -1}, {"bkg_score": -0.1},
        {"high_score": 0.2}, {"low_score": -0.1},
    ],
)  # fmt: skip
def test_settings_check_themselves(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabelSettings(**wrong)


def test_refinement_is_chosen_by_name(case):
    """PAMR is not PAR, and without a refinement the CAM's own maxima are left."""
    images, cam, cls_labels, _ = case
    slots = ClassSlots.of(cls_labels)
    cam = slots.pick(cam)
    by_name = {
        name: refine_label(images, cam, slots, LabelSettings(refinement=name, dilations=(1, 2)), (0.45,))
        for name in ("par", "pamr", "none")
    }
    assert not torch.equal(by_name["par"], by_name["pamr"]) and not torch.equal(by_name["par"], by_name["none"])
    idle = refine_label(images, cam, slots, LabelSettings(num_iter=0), (0.45,))
    assert torch.equal(by_name["none"], idle)


def test_boxes_of_one_size_at_different_places(case):
    """Such images are refined together; each label is the one it gets alone."""
    images, cam, cls_labels, affinity = (torch.cat([tensor, tensor.flip(-1)]) for tensor in case)
    cls_labels = torch.cat([case[2]] * 2)
    boxes = torch.tensor([[0, 30, 6, 52], [10, 40, 3, 49], [0, 40, 0, 56], [5, 5, 0, 56]])
    label = walked_label(images, affinity, cam, cls_labels, boxes)
    for i in range(4):
        one = slice(i, i + 1)
        alone = walked_label(images[one], affinity[one], cam[one], cls_labels[one], boxes[one])
        assert disagreement(label[one], alone) < 1e-3
    assert (label[3] == IGNORE).all()


def test_a_value_at_the_background_score_is_background():
    """It must exceed the score: ties are decided as published, with one score and with two."""
    cam = torch.tensor([0.25, 0.26, 0.5, 0.51]).view(1, 1, 1, 4)
    slots = ClassSlots.of(torch.ones(1, 1))
    assert cam_to_label(cam, slots, (0.5,))[0, 0].tolist() == [0, 0, 0, 1]
    assert cam_to_label(cam, slots, (0.25, 0.5))[0, 0].tolist() == [0, IGNORE, IGNORE, 1]
