"""Both published protocols: recorded labels, logits and scores on photographs; what each setting of them does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.common import DEVICE, relative_error

from afa_model.conventions import resize
from afa_model.data.transforms import normalize
from afa_model.evaluation.evaluate import EvaluateSettings
from afa_model.evaluation.scores import ScoreKeeper
from afa_model.labels import evidence as looks
from afa_model.labels import label_maps as module
from afa_model.labels.evidence import MapSettings
from afa_model.labels.label_maps import label_maps
from afa_model.labels.pseudo_labels import propagate
from afa_model.labels.settings import LabelSettings
from afa_model.labels.slots import ClassSlots
from afa_model.networks.afa import AFA

# recorded name -> protocol or what differs from "test", kind of label map
RECORDED = {
    "val_seg": ({"protocol": "training"}, "segmentation"),
    "val_cam": ({"protocol": "training"}, "cam"),
    "val_aff": ({"protocol": "training"}, "random_walk"),
    "test_seg": ({"protocol": "test", "scales": (1.0,), "flips": False}, "segmentation"),
    "test_msc": ({"protocol": "test"}, "segmentation"),
    "test_crf": ({"protocol": "test"}, "segmentation_crf"),
}


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("evaluation")


@pytest.fixture(scope="module")
def model(golden, recorded):
    changed = {name.removeprefix("state_"): value for name, value in recorded.items() if name.startswith("state_")}
    state = {name: torch.from_numpy(value) for name, value in {**golden("model_state"), **changed}.items()}
    model = AFA("mit_b0", 21)
    model.load_state_dict(state)
    return model.to(DEVICE)


def photographs(recorded) -> int:
    return sum(name.startswith("image_") for name in recorded)


@pytest.fixture(scope="module")
def outcomes(model, recorded) -> dict[str, list[torch.Tensor]]:
    """The label maps of all photographs by recorded name, and as "logits" those of the test protocol."""
    outcomes, real = {name: [] for name in (*RECORDED, "logits", "maps")}, looks._segment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looks, "_segment", lambda *a: outcomes["logits"].append(real(*a)) or outcomes["logits"][-1])
        for i in range(photographs(recorded)):
            image = normalize(torch.from_numpy(recorded[f"image_{i}"]).permute(2, 0, 1))
            present = torch.from_numpy(recorded[f"cls_labels_{i}"])
            for settings in {str(settings): settings for settings, _ in RECORDED.values()}.values():
                kinds = {kind: name for name, (by, kind) in RECORDED.items() if by == settings}
                by = EvaluateSettings(**settings)
                maps = label_maps(model, image, by.maps(), by.labels(LabelSettings()), present, list(kinds))
                if settings["protocol"] == "training":
                    outcomes["maps"].append(maps)
                for kind, name in kinds.items():
                    outcomes[name].append(maps.labels[kind].cpu())
    outcomes["logits"] = [logits[0].cpu() for logits, _ in outcomes["logits"][2::3]]
    return outcomes


@pytest.mark.parametrize("name", RECORDED)
def test_published_labels_and_scores(outcomes, recorded, name):
    keeper, off, pixels = ScoreKeeper(["x"], 21), 0, 0
    for i, label in enumerate(outcomes[name]):
        off, pixels = off + int((label.numpy() != recorded[f"{name}_{i}"]).sum()), pixels + label.numel()
        keeper.add("x", label, torch.from_numpy(recorded[f"mask_{i}"]).long())
    scores = keeper.scores()["x"]
    assert len(outcomes[name]) == photographs(recorded) and off <= 1e-3 * pixels
    np.testing.assert_allclose(scores.iou.numpy(), recorded[f"iou_{name}"], atol=1e-3)
    assert scores.miou == pytest.approx(float(recorded[f"miou_{name}"]), abs=1e-3)


def test_published_logits(outcomes, recorded):
    """Of the test protocol, before they are resized to the photograph."""
    for i, logits in enumerate(outcomes["logits"]):
        want = torch.from_numpy(recorded[f"msc_logits_{i}"]).float()
        assert logits.shape == want.shape and relative_error(logits, want) < 1e-3


def test_published_cam_and_walk(outcomes, recorded):
    """The soft maps of the training protocol on the model's grid."""
    for i, maps in enumerate(outcomes["maps"]):
        cam, walk = (torch.from_numpy(recorded[f"{name}_{i}"]) for name in ("cam", "walk"))
        slots = ClassSlots.of(torch.from_numpy(recorded[f"cls_labels_{i}"])[None])
        small = slots.pick(resize(maps.cam[None].cpu(), cam.shape[1:]))
        assert maps.affinity.shape[1:] == cam.shape[1:]
        assert relative_error(small, slots.pick(cam[None])) < 1e-4
        walked = propagate(maps.affinity[None].cpu(), slots.pick(maps.cam[None].cpu()), slots, LabelSettings(), (0.35,))
        want = torch.cat([walk[None, :1], slots.pick(walk[None, 1:])], 1)
        assert relative_error(walked, want) < 1e-4


@torch.no_grad()
def test_the_classifier_says_the_same_whichever_labels_are_asked_for(model, recorded):
    image = normalize(torch.from_numpy(recorded["image_0"]).permute(2, 0, 1)[:, :64, :96])
    asked = ((1.0,), False, ["cam"]), ((1.0, 0.5), True, ["segmentation"]), ((0.5,), True, None)
    ways = [
        label_maps(model, image, MapSettings(0, scales, flips), LabelSettings(cam_scales=(1.0,)), kinds=kinds)
        for scales, flips, kinds in asked
    ]
    want = model.eval()(image[None].to(DEVICE)).cls_logits[0].sigmoid()
    for maps in ways:
        torch.testing.assert_close(maps.probabilities, want)
    assert ways[1].cam is None and ways[1].affinity is None


def test_what_is_not_said_is_as_the_protocol_has_it():
    training, test = (EvaluateSettings(protocol=name) for name in ("training", "test"))
    assert training.maps() == MapSettings(0, (1.0,), False, "plain")
    assert test.maps() == EvaluateSettings().maps() == MapSettings(512, (1.0, 0.5, 0.75), True, "largest")
    assert training.labels(LabelSettings()).one_walk_score == (0.35,)
    assert test.labels(LabelSettings()).one_walk_score == (0.45,)
    assert training.labels(LabelSettings(walk_score=0.2)).one_walk_score == (0.2,)
    assert EvaluateSettings(protocol="training", walk_score=0.1).labels(LabelSettings()).one_walk_score == (0.1,)
    assert EvaluateSettings(protocol="training", long_side=100, flips=True).maps() == MapSettings(
        100, (1.0,), True, "plain"
    )
    assert EvaluateSettings().by("training").protocol == "training"
    assert EvaluateSettings(protocol="test").by("training").protocol == "test"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"protocol": "published"}, "protocol: expected training or test"),
        ({"long_side": 20}, "long_side: expected at least 32"),
        ({"scales": ()}, "scales: expected positive"),
        ({"affinity_of": "all"}, "affinity_of: expected largest or plain"),
        ({"walk_score": -0.1}, "walk_score: expected a score in 0..1, got -0.1"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        EvaluateSettings(**settings)


class Constant(torch.nn.Module):
    """Logits of 4 classes that tell the size of the image and whether it is mirrored."""

    has_affinity, num_classes = True, 4

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def forward(self, images, decode=True):
        self.sizes.append(tuple(images.shape))
        logits = torch.nn.functional.avg_pool2d(images, 4, ceil_mode=True)
        return SimpleNamespace(seg_logits=logits, cls_logits=torch.zeros(len(images), 3))


def test_a_pair_is_averaged_and_scales_are_maximised():
    image = torch.zeros(1, 3, 16, 24)
    image[0, 0, :, :12], image[0, 1] = 8.0, 3.0
    model = Constant()
    best, plain = looks._segment(model, image, MapSettings(0, (0.5, 1.0)))
    assert model.sizes == [(2, 3, 16, 24), (2, 3, 8, 12)], "scale 1 first: its grid is everyone's"
    assert best.shape == (1, 3, 4, 6) and plain.seg_logits.shape == (2, 3, 4, 6)
    # The mirrored copy's logits are mirrored back: here they agree with the others, so the mean is what both say.
    torch.testing.assert_close(best[0, 0, 0, [0, 5]], torch.tensor([8.0, 0.0]))
    torch.testing.assert_close(best[0, 1], torch.full((4, 6), 3.0))

    class Biased(Constant):
        def forward(self, images, decode=True):
            result = super().forward(images)
            bias = torch.arange(len(images)).view(-1, 1, 1, 1) * 2.0  # the mirrored one is 2 higher
            scale = 5.0 if images.shape[2] < 16 else 0.0
            return SimpleNamespace(seg_logits=result.seg_logits * 0 + bias + scale, cls_logits=result.cls_logits)

    best, _ = looks._segment(Biased(), image, MapSettings(0, (1.0, 0.5)))
    assert torch.equal(best, torch.full((1, 3, 4, 6), 6.0)), "mean of 5 and 7, larger than that of 0 and 2"
    best, _ = looks._segment(Biased(), image, MapSettings(0, (1.0,), flips=False))
    assert torch.equal(best, torch.zeros(1, 3, 4, 6))


@pytest.mark.parametrize(
    ("size", "want"),
    [((167, 251), (340, 512)), ((500, 375), (512, 384)), ((512, 100), (512, 100)), ((999, 10), (512, 5))],
)
def test_sizes_are_rounded_down(size, want):
    got = tuple(looks._resize_long_side(torch.zeros(1, 3, *size), 512).shape[2:])
    assert got == want


def test_published_resizing_is_bilinear_without_antialiasing():
    """To the longer side by size, to another scale by its factor: the grid is then the factor's, not the size's."""
    image, seen = torch.rand(1, 3, 33, 50), []
    got = looks._resize_long_side(image, 40)
    assert torch.equal(got, torch.nn.functional.interpolate(image, (26, 40), mode="bilinear", align_corners=False))

    class Seeing(Constant):
        def forward(self, images, decode=True):
            seen.append(images)
            return super().forward(images)

    looks._segment(Seeing(), image, MapSettings(0, (1.0, 0.75), flips=False))
    want = torch.nn.functional.interpolate(image, scale_factor=0.75, mode="bilinear", align_corners=False)
    assert torch.equal(seen[0], image) and torch.equal(seen[1], want)
    best, _ = looks._segment(Constant(), image[:, :, :1], MapSettings(0, (1.0, 0.5)))
    assert best.shape == (1, 3, 1, 13), "no scale makes nothing of a photograph"


def test_each_label_has_its_own_background_score():
    """The CAM's and the random walk's, as the published validation has 0.45 and 0.35."""
    slots, how = ClassSlots.of(torch.ones(1, 1)), LabelSettings(radius=1, walk_score=0.35)
    cam, itself = torch.full((1, 1, 4, 4), 0.4), torch.zeros(1, 9, 4, 4)
    itself[:, 4] = 1  # each pixel's affinity with itself alone
    images01 = torch.rand(1, 3, 4, 4)
    for kind, found in (("cam", 0), ("refined_cam", 0), ("random_walk", 1), ("refined_random_walk", 1)):
        assert (module.pseudo_label(kind, images01, cam, itself, slots, how) == found).all(), kind


def test_a_class_is_found_above_a_half():
    assert looks.found_classes(torch.tensor([0.5, 0.51, 0.2])).tolist() == [0, 1, 0]
    assert looks.found_classes(torch.tensor([0.3, 0.5, 0.2])).tolist() == [0, 1, 0], "or the likeliest"
    assert looks.found_classes(torch.tensor([0.5, 0.5, 0.2])).tolist() == [1, 0, 0]


def test_the_dense_crf_sees_the_photographs_own_bytes(monkeypatch):
    photo, seen = torch.arange(252).view(3, 12, 7).to(torch.uint8), []
    monkeypatch.setattr(module, "crf", lambda images01, probs, *_: seen.append(images01) or probs)
    module.crf_label(normalize(photo)[None], torch.rand(1, 4, 3, 2), LabelSettings().dense_crf)
    assert torch.equal(seen[0][0], photo.float() / 255)
