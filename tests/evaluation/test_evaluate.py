"""Evaluation: scores against recorded ones, every image counted once, a known model scored as it must be."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from support import forked
from support.color_model import ColorModel
from support.common import relative_error
from support.voc_factory import make_voc
from torch.utils._python_dispatch import TorchDispatchMode

from afa_model.data.datasets import DataSettings, EvaluationSet
from afa_model.evaluation.evaluate import EvaluateSettings, evaluate
from afa_model.evaluation.scores import EvaluationResult, ScoreKeeper, Scores, image_level_scores
from afa_model.labels.crf import CrfSettings
from afa_model.labels.evidence import MapSettings, found_classes
from afa_model.labels.kinds import KINDS, kinds_of
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA

# the test photographs are 48 pixels high: smaller PAR and no enlarging
SMALL = {
    "long_side": 0,
    "scales": (1.0, 0.5),
    "cam_scales": (1.0, 0.5),
    "radius": 3,
    "dilations": (1, 2),
}
SIZES, HOW = MapSettings(None, (1.0, 0.5)), LabelSettings(cam_scales=(1.0, 0.5), radius=3, dilations=(1, 2))


@pytest.fixture
def data(tmp_path) -> EvaluationSet:
    make_voc(tmp_path)
    return EvaluationSet(DataSettings(root=str(tmp_path)))


# scores


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **options or {})
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("deterministic", [True, False])
def test_counting_pixels_takes_no_more_room_than_they_do(rng, deterministic):
    """Compared with each entry of the matrix a photograph of COCO would take 16 GB, and a second for each label."""
    label, mask = torch.randint(81, (2, 90, 110), generator=rng)
    keeper = ScoreKeeper(["x"], 81)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Largest() as largest:
            keeper.add("x", label, mask)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    assert largest.elements == label.numel() > 81**2
    confusion = keeper.scores()["x"].confusion
    assert confusion.sum() == label.numel() and confusion[7, 3] == ((mask == 7) & (label == 3)).sum()


def test_scores_are_the_recorded_ones(golden):
    recorded = golden("schedule_and_scores")
    keeper = ScoreKeeper(["x"], 21)
    for label, mask in zip(recorded["pred"], recorded["gt"]):
        keeper.add("x", torch.from_numpy(label.astype(np.int64)), torch.from_numpy(mask.astype(np.int64)))
    scores = keeper.scores()["x"]
    assert scores.pixel_accuracy == pytest.approx(float(recorded["pAcc"]), rel=1e-12)
    assert scores.mean_accuracy == pytest.approx(float(recorded["mAcc"]), rel=1e-12)
    assert scores.miou == pytest.approx(float(recorded["miou"]), rel=1e-12)
    np.testing.assert_allclose(scores.iou.numpy(), recorded["iou"], rtol=1e-12)


def test_scores_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 255]])
    keeper = ScoreKeeper(["x"], 4)
    keeper.add("x", torch.tensor([[0, 1, 1, 2, 3]]), mask)
    scores = keeper.scores()["x"]
    assert scores.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scores.iou[:3].tolist() == pytest.approx([1 / 2, 1 / 3, 0]) and math.isnan(scores.iou[3])
    assert scores.miou == pytest.approx((1 / 2 + 1 / 3) / 2), "over the classes in the masks"
    assert scores.mean_accuracy == pytest.approx(1 / 2) and scores.pixel_accuracy == pytest.approx(1 / 2)


def test_scores_of_the_classifier_by_hand():
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    probabilities = torch.tensor([[0.9, 0.6, 0.9], [0.4, 0.5001, 0.1], [0.3, 0.5, 0.2]])
    got = image_level_scores(probabilities, labels)
    # First class: one of two found, nothing wrongly, 2/3; both before the third image. Second: the first image wrongly,
    # the second rightly, the third not (0.5 is not more than 0.5), 1/2; precision 1/2 and 2/3 at its two images.
    assert got["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)
    assert got["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2, abs=1e-6)
    assert all(map(math.isnan, image_level_scores(probabilities, 0 * labels).values()))
    assert all(map(math.isnan, image_level_scores(probabilities * math.nan, labels).values()))


@pytest.mark.parametrize(
    ("label", "mask", "name"),
    [
        ([[0, 4]], [[0, 1]], "label"),
        ([[0, 255]], [[0, 1]], "label"),
        ([[0, 1]], [[0, 7]], "mask"),
        ([[0]], [[0, 1]], "label"),
    ],
)
def test_bad_labels_are_named(label, mask, name):
    with pytest.raises(ValueError, match=name):
        ScoreKeeper(["x"], 4).add("x", torch.tensor(label), torch.tensor(mask))


def test_nothing_scored_is_nan_and_not_an_error():
    scores = Scores.of(torch.zeros(3, 3, dtype=torch.int64))
    assert math.isnan(scores.miou) and math.isnan(scores.pixel_accuracy)


# reports


@pytest.fixture
def result() -> EvaluationResult:
    right = Scores.of(torch.tensor([[8, 0, 0], [0, 2, 0], [0, 0, 0]]))
    poor = Scores.of(torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]]))
    return EvaluationResult(
        {"cam": poor, "segmentation": right}, ("background", "disc", "ring"), 2, 1.5, {"split": "val"}
    )


def test_json_holds_every_number(result, tmp_path):
    content = json.loads(result.write_json(tmp_path / "new" / "scores.json").read_text())
    assert content["images"] == 2 and content["about"] == {"split": "val"}
    assert content["scores"]["segmentation"]["miou"] == 1
    assert content["scores"]["cam"]["iou"] == {"background": 0.666667, "disc": 0.25, "ring": None}


def test_csv_has_a_row_per_class_and_the_means(result, tmp_path):
    rows = list(csv.reader(result.write_csv(tmp_path / "scores.csv").open()))
    assert rows[0] == ["class", "cam", "segmentation"]
    assert rows[2] == ["disc", "0.250000", "1.000000"] and rows[3] == ["ring", "", ""]
    assert [row[0] for row in rows[4:]] == ["miou", "pixel_accuracy", "mean_accuracy"]


def test_table_shows_percent_and_leaves_out_what_never_occurs(result):
    console = Console(file=io.StringIO(), width=80)
    result.print(console)
    text = console.file.getvalue()
    assert "CAM" in text and "segmentation" in text and "2 images" in text
    assert "66.7" in text and "100.0" in text and "ring" not in text
    assert [line.split() for line in text.splitlines() if "mIoU" in line] == [["mIoU", "45.8", "100.0"]]


# the whole


def test_a_model_that_knows_gets_what_it_deserves(data):
    model = ColorModel().train()
    result = evaluate(model, data, EvaluateSettings(**SMALL))
    assert model.training and model.dropout.training
    assert list(result.scores) == list(KINDS) and result.images == 6
    assert result["segmentation"].miou > 0.99
    for kind in ("cam", "refined_cam", "random_walk", "refined_random_walk"):
        assert result[kind].miou > 0.75, kind
        # image-level labels are known to these: no class that is in no image can be found
        assert result[kind].iou.isnan().sum() == 21 - 4
    counted = sum((data[i]["mask"] != 255).sum().item() for i in range(6))
    assert all(scores.confusion.sum() == counted for scores in result.scores.values())


def test_limit_and_kinds(data):
    result = evaluate(ColorModel(), data, EvaluateSettings(**SMALL, kinds=("segmentation", "cam"), limit=2))
    assert list(result.scores) == ["cam", "segmentation"] and result.images == 2
    counted = sum((data[i]["mask"] != 255).sum().item() for i in range(2))
    assert result["cam"].confusion.sum() == counted
    with pytest.raises(ValueError, match="limit"):
        EvaluateSettings(limit=0)
    with pytest.raises(ValueError, match="kinds: unknown kind 'magic'"):
        evaluate(ColorModel(), data, EvaluateSettings(kinds=("magic",)))


def test_the_segmentation_after_a_crf_is_a_row_of_its_own_on_request(data):
    how = LabelSettings(dense_crf=CrfSettings(3, pos_w=40, pos_xy_std=12))  # small things go under
    asked = EvaluateSettings(**SMALL, limit=2, crf=True)
    result = evaluate(ColorModel(), data, asked, how)
    assert list(result.scores) == [*KINDS, "segmentation_crf"]
    assert result.table().columns[-1].header == "segmentation + CRF"
    both = result["segmentation"], result["segmentation_crf"]
    assert both[0].miou > both[1].miou + 0.01
    alone = dataclasses.replace(asked, kinds=("segmentation_crf",), crf=False)
    again = evaluate(ColorModel(), data, alone, how)
    assert list(again.scores) == ["segmentation_crf"]
    assert torch.equal(again["segmentation_crf"].confusion, both[1].confusion)
    assert kinds_of(ColorModel(), ("cam",), crf=True) == ("cam", "segmentation_crf")
    with pytest.raises(ValueError, match="'segmentation_crf' needs a backbone with attention"):
        kinds_of(AFA("resnet18", 21), crf=True)


def test_evaluation_leaves_the_random_state_alone(data):
    state = torch.random.get_rng_state()
    evaluate(ColorModel(), data, EvaluateSettings(**SMALL, limit=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_number_of_classes_must_agree(data):
    model = ColorModel()
    model.num_classes = 5
    with pytest.raises(ValueError, match="5 classes, but the data set has 21"):
        evaluate(model, data)


def _evaluate_in_group(rank: int, root: str, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = EvaluationSet(DataSettings(root=root))
    result = evaluate(ColorModel(), data, EvaluateSettings(**SMALL, limit=5))
    torch.save(
        (result.images, {kind: scores.confusion for kind, scores in result.scores.items()}), f"{out}{rank}"
    )
    dist.destroy_process_group()


def test_two_processes_count_every_image_once(data, tmp_path):
    alone = evaluate(ColorModel(), data, EvaluateSettings(**SMALL, limit=5))
    forked.processes(_evaluate_in_group, 2, str(data.root), str(tmp_path / "store"), str(tmp_path / "out"))
    for rank in range(2):
        images, confusions = torch.load(f"{tmp_path / 'out'}{rank}")
        assert images == 5
        for kind, confusion in confusions.items():
            assert torch.equal(confusion, alone[kind].confusion), kind


CALLED = [("par", "PAR"), ("pamr", "PAMR"), ("crf", "CRF"), ("none", "no refinement")]


@pytest.mark.parametrize(("refinement", "called"), CALLED)
def test_the_table_names_the_refinement(data, refinement, called):
    asked = EvaluateSettings(**SMALL, limit=1, kinds=("cam", "refined_cam"))
    result = evaluate(ColorModel(), data, asked, LabelSettings(refinement=refinement))
    assert [column.header for column in result.table().columns] == ["class", "CAM", f"CAM + {called}"]


# label maps of one photograph


def test_sizes_are_those_of_the_photograph(data):
    image = data[3]["image"]
    for long_side in (None, 40, 100):
        maps = label_maps(ColorModel(), image, MapSettings(long_side, (1.0, 0.5)), HOW, data[3]["cls_labels"])
        assert maps.cam.shape[0] == 20 and 0 <= maps.cam.min() <= maps.cam.max() <= 1
        assert max(maps.cam.shape[1:]) == (long_side or max(image.shape[1:]))
        assert set(maps.labels) == set(KINDS)
        for label in maps.labels.values():
            assert label.shape == image.shape[1:] and label.dtype == torch.uint8 and label.max() < 21
        assert maps.affinity.shape[0] == 49


def test_how_labels_are_made_reaches_every_kind(data):
    """Each of these changes the label maps that depend on it, and no other."""
    sample = data[3]

    def maps(**changes):
        how = dataclasses.replace(HOW, **changes)
        return label_maps(ColorModel(), sample["image"], SIZES, how, sample["cls_labels"]).labels

    plain = maps()
    walks, refined = {"random_walk", "refined_random_walk"}, {"refined_cam", "refined_random_walk"}
    for changes, touched in (
        ({"walk_power": 0.2}, walks),
        ({"walk_eps": 200.0}, walks),
        ({"refinement": "none"}, refined),
        ({"bkg_score": 0.9}, {"cam", *walks, *refined}),
    ):
        other = maps(**changes)
        changed = {kind for kind in KINDS if not torch.equal(other[kind], plain[kind])}
        assert changed and changed <= touched, changes


def test_without_labels_the_classifier_decides(data):
    for index in range(4):
        sample = data[index]
        maps = label_maps(ColorModel(), sample["image"], SIZES, HOW)
        assert torch.equal(maps.cls_labels, sample["cls_labels"])
        assert maps.present == (sample["cls_labels"].nonzero().flatten() + 1).tolist()


def test_found_classes_are_those_above_half_or_the_likeliest():
    assert found_classes(torch.tensor([0.6, 0.5, 0.9])).tolist() == [1, 0, 1]
    assert found_classes(torch.tensor([0.1, 0.3, 0.2])).tolist() == [0, 1, 0]


def test_an_image_without_classes_is_all_background(data):
    maps = label_maps(ColorModel(), data[0]["image"], SIZES, HOW, torch.zeros(20))
    assert all((maps.labels[kind] == 0).all() for kind in KINDS if kind != "segmentation")


def test_segmentation_is_the_largest_over_scales_of_the_mean_of_a_pair(data):
    torch.manual_seed(0)
    model = AFA("mit_b0", 21).eval()
    image = data[0]["image"]
    asked = MapSettings(None, (1.0, 0.75)), HOW, data[0]["cls_labels"], ("segmentation",)
    got = label_maps(model, image, *asked).labels["segmentation"]
    views = []
    size = image.shape[1:]
    grid = tuple(-(-side // 4) for side in size)
    with torch.no_grad():
        for view_size in (tuple(size), (36, 48)):
            resized = torch.nn.functional.interpolate(image[None], view_size, mode="bilinear")
            pair = (model(resized).seg_logits + model(resized.flip(3)).seg_logits.flip(3)) / 2
            views.append(torch.nn.functional.interpolate(pair, grid, mode="bilinear"))
    best = torch.stack(views).amax(0)
    want = torch.nn.functional.interpolate(best, tuple(size), mode="bilinear").argmax(1)[0]
    assert (got != want).float().mean() < 1e-3


def test_a_cnn_gives_cams_only(data):
    torch.manual_seed(0)
    model = AFA("resnet18", 21, stride=(4, 2, 2, 1))
    assert kinds_of(model) == ("cam", "refined_cam")
    result = evaluate(model, data, EvaluateSettings(limit=1, long_side=0))
    assert list(result.scores) == ["cam", "refined_cam"]
    with pytest.raises(ValueError, match="'random_walk' needs a backbone with attention"):
        evaluate(model, data, EvaluateSettings(kinds=("random_walk",)))


def test_the_recorded_model_evaluates_real_photographs(golden, voc_root):
    state = golden("model_state")
    model = AFA("mit_b0", 21)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    data = EvaluationSet(DataSettings(root=str(voc_root)))
    result = evaluate(model, data, EvaluateSettings(limit=1, long_side=256))
    assert all(0 <= scores.miou <= 1 for scores in result.scores.values())
    again = evaluate(model, data, EvaluateSettings(limit=1, long_side=256))
    for kind in KINDS:
        assert relative_error(again[kind].confusion, result[kind].confusion) == 0
