"""The label of one photograph, for training something else on: that of evaluation, that of training, how sure it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.color_model import ColorModel
from support.tiny_step import batch, tiny

from afa_kernels import par
from afa_model.conventions import IGNORE, denormalize
from afa_model.data.transforms import normalize
from afa_model.labels import large
from afa_model.labels.evidence import MapSettings, evidence
from afa_model.labels.kinds import KINDS
from afa_model.labels.label_maps import label_maps
from afa_model.labels.photograph_labels import photograph_label, photograph_walk
from afa_model.labels.settings import LabelSettings
from afa_model.training.step import StepSettings, TrainingStep

HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=2, dilations=(1, 3), num_iter=2, bkg_score=0.5, walk_score=0.3)
SIZES = MapSettings(48)
OF_CAM = [kind for kind in KINDS if kind != "segmentation"]


@pytest.fixture
def photo() -> torch.Tensor:
    """Three colours that the model knows, with soft edges; [1, 3, 50, 61], normalised."""
    pixels = torch.full((3, 50, 61), 40.0)
    for (y, x), color in {(3, 4): (220, 30, 30), (9, 35): (30, 200, 40), (30, 20): (40, 60, 230)}.items():
        pixels[:, y : y + 19, x : x + 22] = torch.tensor(color, dtype=torch.float32)[:, None, None]
    pixels = F.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)
    return normalize(pixels.to(torch.uint8))[None]


@pytest.fixture(params=["of usual size", "large"])
def any_size(request, monkeypatch):
    if request.param == "large":
        for name, value in (("PIXELS", 0), ("BAND_VALUES", 700), ("REFINED_BYTES", 30_000), ("REFINED_CLASSES", 2)):
            monkeypatch.setattr(large, name, value)


def shown(*classes: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(classes) - 1, 20).sum(0).float()


PRESENT = shown(1, 8, 15)


@pytest.mark.parametrize("kind", OF_CAM)
def test_without_unknown_pixels_it_is_what_evaluation_scores(photo, kind, any_size):
    want = label_maps(ColorModel(), photo[0], SIZES, HOW, PRESENT, (kind,)).labels[kind]
    seen = evidence(ColorModel(), photo, SIZES, HOW, PRESENT)
    got = photograph_label(kind, photo, seen, HOW, unknown=False)
    assert got.label.dtype == torch.uint8 and got.confidence is None
    assert torch.equal(got.label, want) and len(want.unique()) >= 3


@pytest.mark.parametrize("kind", ["refined_cam", "refined_random_walk"])
def test_with_them_it_is_what_a_training_step_learns_from(kind):
    data = {key: value[:1] for key, value in batch().items() if key != "img_box"}
    how = LabelSettings(radius=2, high_score=0.6, low_score=0.2)
    model = tiny()
    step = TrainingStep(model, StepSettings(0, 1), how)(data, 2)
    want = step.aff_label if kind == "refined_random_walk" else step.refined_label
    seen = evidence(tiny(), data["image"], MapSettings(0), how, data["cls_labels"][0])
    got = photograph_label(kind, data["image"], seen, how).label
    assert torch.equal(got.long(), want[0]) and (got == IGNORE).any() and (got != IGNORE).any()


@pytest.mark.parametrize("kind", OF_CAM)
def test_unknown_is_where_the_two_scores_disagree(photo, kind, any_size):
    seen = evidence(ColorModel(), photo, SIZES, HOW, PRESENT)
    made = [
        photograph_label(kind, photo, seen, dataclasses.replace(HOW, bkg_score=score, walk_score=score), False, True)
        for score in HOW.scores
    ]
    (low, low_share), (high, high_share) = ((one.label, one.confidence) for one in made)
    both = photograph_label(kind, photo, seen, HOW, confidence=True)
    unknown = (low > 0) & (high == 0)
    assert unknown.any() and torch.equal(both.label == IGNORE, unknown)
    assert torch.equal(both.label[~unknown], high[~unknown])
    assert torch.equal(both.confidence, torch.where(unknown, 0, torch.where(high > 0, high_share, low_share)))


def test_confidence_is_the_share_of_the_winner(photo, any_size):
    seen = evidence(ColorModel(), photo, SIZES, HOW, PRESENT)
    size = tuple(photo.shape[2:])
    walk = photograph_walk(size, seen, HOW)
    assert walk.shape[0] == 4, "the background and the three classes shown"
    at_size = F.interpolate(walk[None], size, mode="bilinear")
    half = F.interpolate(denormalize(photo), (25, 30), mode="bilinear")
    refined = F.interpolate(par(half, at_size, (1, 3), 2), size, mode="bilinear")
    cam = F.interpolate(seen.cam, size, mode="bilinear")
    with_background = torch.cat([torch.full_like(cam[:, :1], HOW.bkg_score), cam], 1)
    numbers = torch.tensor([0, 1, 8, 15])
    for kind, maps in (
        ("cam", with_background.softmax(1)), ("random_walk", at_size), ("refined_random_walk", refined)
    ):  # fmt: skip
        got = photograph_label(kind, photo, seen, HOW, unknown=False, confidence=True)
        value, index = maps[0].max(0)
        assert torch.equal(got.label.long(), numbers[index]), kind
        assert got.confidence.dtype == torch.float16 and got.confidence.shape == size
        torch.testing.assert_close(got.confidence.float(), value / maps[0].sum(0), atol=1e-3, rtol=0)
    assert refined[0].sum(0).mean() > 1.01, "what PAR gives is no probability before it is made a share"


def test_a_walk_resized_is_the_random_walk_label(photo, any_size):
    want = label_maps(ColorModel(), photo[0], SIZES, HOW, PRESENT, ("random_walk",)).labels["random_walk"]
    walk = photograph_walk(photo.shape[2:], evidence(ColorModel(), photo, SIZES, HOW, PRESENT), HOW)
    index = F.interpolate(walk[None], tuple(photo.shape[2:]), mode="bilinear")[0].argmax(0)
    assert torch.equal(torch.tensor([0, 1, 8, 15])[index], want.long())


def test_a_photograph_without_a_class_is_background(photo, any_size):
    seen = evidence(ColorModel(), photo, SIZES, HOW, torch.zeros(20))
    for kind in OF_CAM:
        got = photograph_label(kind, photo, seen, HOW, confidence=True)
        assert not got.label.any() and (got.confidence == 1).all()
    assert (photograph_walk(photo.shape[2:], seen, HOW).shape[0]) == 1


def test_the_classifier_finds_what_is_above_the_threshold(photo):
    found = {
        threshold: [int(i) + 1 for i in evidence(ColorModel(), photo, SIZES, HOW, None, threshold).cls_labels.nonzero()]
        for threshold in (0.5, 1.0)
    }
    assert found[0.5] == [1, 8, 15] and len(found[1.0]) == 1


def test_networks_in_bfloat16_see_nearly_the_same(photo):
    """Everything but them in float32, and every kind of label there."""
    model = tiny()
    present = torch.zeros(model.num_classes - 1)
    present[:2] = 1
    kinds = tuple(kind for kind in KINDS if kind != "segmentation_crf")
    plain, half = (
        label_maps(model, photo[0], dataclasses.replace(SIZES, amp=amp), HOW, present, kinds) for amp in ("off", "bf16")
    )
    auto = label_maps(model, photo[0], dataclasses.replace(SIZES, amp="auto"), HOW, present, kinds)
    assert torch.equal(auto.probabilities, plain.probabilities) == (photo.device.type == "cpu")
    assert not torch.equal(half.probabilities, plain.probabilities), "it is used"
    assert torch.allclose(half.probabilities, plain.probabilities, atol=0.02)
    assert half.cam.dtype == half.affinity.dtype == half.probabilities.dtype == torch.float32
    for kind in kinds:
        assert (half.labels[kind] != plain.labels[kind]).double().mean() < 0.1, kind
    with pytest.raises(ValueError, match="amp: expected auto, bf16 or off"):
        MapSettings(amp="fp16")
