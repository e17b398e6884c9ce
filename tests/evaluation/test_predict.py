"""Prediction: what is written where, with which classes, and that every mistake is told before anything is
written.
"""

from __future__ import annotations

import errno
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.color_model import ColorModel
from support.voc_factory import make_voc

from afa_model.data.classes import VOC_CLASSES, voc_palette
from afa_model.data.files import read_label, read_photo
from afa_model.data.transforms import normalize
from afa_model.errors import ConfigError, DataError
from afa_model.evaluation import predict as predict_module
from afa_model.evaluation.predict import PredictSettings, draw_head_weights, photos, predict
from afa_model.labels.crf import CrfSettings
from afa_model.labels.evidence import MapSettings
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA

SMALL = {"long_side": None, "scales": (1.0,)}
CRF = CrfSettings(3, pos_w=40, pos_xy_std=12)  # small things go under
HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=3, dilations=(1, 2), dense_crf=CRF)


@pytest.fixture
def root(tmp_path):
    make_voc(tmp_path, count=2)
    return tmp_path


def run(root, images=None, **changes):
    images = [root / "JPEGImages"] if images is None else images
    return predict(
        ColorModel().train(), images, root / "out", VOC_CLASSES, PredictSettings(**{**SMALL, **changes}), HOW
    )


def test_labels_and_panels_are_written(root):
    done = run(root)
    assert [item.image.name for item in done] == ["2007_000000.jpg", "2007_000001.jpg"]
    for item in done:
        assert item.label == root / "out" / f"{item.image.stem}.png"
        assert item.panel == root / "out" / f"{item.image.stem}_panel.png"
        with Image.open(item.label) as image, Image.open(item.image) as photo:
            assert image.mode == "P" and image.size == photo.size
            assert np.array_equal(np.array(image.getpalette()).reshape(-1, 3), voc_palette())
        mask = read_label(root / "SegmentationClassAug" / item.label.name)
        counted = mask != 255
        assert (read_label(item.label) == mask)[counted].float().mean() > 0.99
        with Image.open(item.panel) as image:
            assert min(image.size) > 300
    assert [name for name, _ in done[0].found] == ["aeroplane"]
    assert {name for name, _ in done[1].found} == {"cat", "person"}
    assert all(0.5 < score <= 1 for item in done for _, score in item.found)


def test_labels_can_be_given_and_panels_left_out(root):
    (item,) = run(root, [root / "JPEGImages" / "2007_000000.jpg"], labels=("person",), panels=False)
    assert [name for name, _ in item.found] == ["person"]
    assert item.panel is None and sorted(file.name for file in (root / "out").iterdir()) == [
        "2007_000000.png"
    ]


def test_the_point_of_the_affinity_can_be_chosen(root):
    image = root / "JPEGImages" / "2007_000000.jpg"
    first = run(root, [image], affinity_at=(20, 10))[0].panel.read_bytes()
    assert run(root, [image], affinity_at=(20, 10))[0].panel.read_bytes() == first
    assert run(root, [image], affinity_at=(40, 60))[0].panel.read_bytes() != first
    (root / "out").joinpath("2007_000000.png").unlink()
    with pytest.raises(ValueError, match=r"affinity_at: .* 2007_000000.jpg \(0..47, 0..63\), got 48,0"):
        run(root, [image], affinity_at=(48, 0))
    assert not (root / "out" / "2007_000000.png").exists()


def test_the_label_is_that_after_the_crf_on_request(root, monkeypatch):
    image, drawn = root / "JPEGImages" / "2007_000001.jpg", []
    real = predict_module.prediction_panel

    def kept(*arguments, prediction, **more):
        drawn.append(torch.as_tensor(prediction))
        return real(*arguments, prediction=prediction, **more)

    monkeypatch.setattr(predict_module, "prediction_panel", kept)
    labels = []
    for crf in (False, True):
        run(root, [image], crf=crf)
        labels.append(read_label(root / "out" / "2007_000001.png"))
        assert torch.equal(drawn[-1].long(), labels[-1])
    assert not torch.equal(*labels)
    photo = normalize(read_photo(image))
    maps = label_maps(ColorModel(), photo, MapSettings(None, (1.0,)), HOW, kinds=("segmentation_crf",))
    assert torch.equal(labels[1], maps.labels["segmentation_crf"].long())


def test_photographs_are_turned_upright(root):
    path = root / "turned.jpg"
    with Image.open(root / "JPEGImages" / "2007_000000.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        image.save(path, exif=exif)
    (item,) = run(root, [path], affinity_at=(63, 47))
    assert read_label(item.label).shape == (64, 48)


def test_what_does_not_exist_is_named_before_anything_is_written(root):
    (root / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        run(root, [root / "JPEGImages", root / "gone.jpg", root / "empty", root / "no*.jpg"])
    assert len(caught.value.problems) == 3
    for name in ("gone.jpg: not found", "empty: no photograph", "no*.jpg: no photograph matches"):
        assert any(name in line for line in caught.value.problems)
    with pytest.raises(DataError, match="none given"):
        run(root, [])
    (root / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: expected a folder, but .*file is a file"):
        predict(ColorModel(), [root / "JPEGImages"], root / "file", VOC_CLASSES, PredictSettings(**SMALL), HOW)
    assert not (root / "out").exists()


def test_one_that_cannot_be_read_does_not_end_a_folder(root):
    broken, notes = root / "JPEGImages" / "2007_000000.jpg", root / "notes.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    notes.write_text("no photograph")
    (cut, whole, text) = run(root, [root / "JPEGImages", notes])
    assert cut.image == broken and cut.label is None and "2007_000000.jpg: cannot be decoded" in cut.problem
    assert text.image == notes and re.search(r"notes\.jpg: .*\(it is a text\)", text.problem)
    assert whole.problem is None and whole.label.exists()
    with pytest.raises(DataError, match=r"none can be labelled\n.*notes\.jpg"):
        run(root, [notes])


def test_photographs_of_every_kind_in_folders_below_and_by_pattern(root):
    folder = root / "mine"
    (folder / "below" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    with Image.open(root / "JPEGImages" / "2007_000000.jpg") as image:
        image.load()
        for name in ("a.bmp", "a.webp", "b.JPeG", "below/c.gif", "below/deep/a.tif", ".hidden/d.png"):
            image.save(folder / name)
    (folder / "._b.jpg").write_bytes(b"no photograph")
    (folder / "notes.txt").write_text("no photograph")
    os.mkfifo(folder / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg: neither a file nor a folder"):
        photos([folder / "pipe.jpg"])
    done = predict(ColorModel(), [folder], folder / "out", VOC_CLASSES, PredictSettings(**SMALL, panels=False), HOW)
    labels = [str(item.label.relative_to(folder / "out")) for item in done]
    assert labels == ["a.bmp.png", "a.webp.png", "b.png", "below/c.png", "below/deep/a.png"]
    assert all(item.label.exists() for item in done)
    # what was predicted is no photograph, wherever it lies; nor are what is hidden and what is no file
    assert len(photos([folder], folder / "out")) == 5
    for _ in range(2):
        again = predict(ColorModel(), [folder / "below"], folder / "below", VOC_CLASSES, PredictSettings(**SMALL), HOW)
        assert [item.image.name for item in again] == ["c.gif", "a.tif"]
    assert len(photos([folder], "elsewhere")) == 5
    twice = [folder / "b.JPeG", folder / "below" / ".." / "b.JPeG"]
    assert list(photos(twice)) == twice[:1]
    assert [path.name for path in photos([str(folder / "**" / "*.t*")])] == ["a.tif"]
    with_spaces = [path.name for path in photos([str(folder / "[ab].*")])]
    assert with_spaces == ["a.bmp", "a.webp", "b.JPeG"]


def test_a_photograph_of_many_pixels_and_one_that_is_not_to_be_turned(root):
    path = root / "JPEGImages" / "2007_000000.jpg"
    with pytest.raises(DataError, match=r"64x48 pixels, more than the limit max_pixels = 3071"):
        run(root, [path], max_pixels=3071)
    with Image.open(path) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    (item,) = run(root, [path], exif="ignore")
    assert read_label(item.label).shape == (48, 64)
    for wrong in ({"exif": "turn"}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PredictSettings(**wrong)


def test_no_file_is_overwritten_by_another(root):
    make_voc(root / "b", count=1)
    with pytest.raises(DataError, match=r"out: .*\n.*2007_000000\.png"):
        run(root, [root / "JPEGImages", root / "b" / "JPEGImages"])
    make_voc(root / "png", count=1, suffix="png")
    model, folder = ColorModel(), root / "png" / "JPEGImages"
    before = (folder / "2007_000000.png").read_bytes()
    with pytest.raises(DataError, match="overwrite"):
        predict(model, [folder], folder, VOC_CLASSES, PredictSettings(**SMALL), HOW)
    assert (folder / "2007_000000.png").read_bytes() == before


def test_settings_as_they_are_typed():
    settings = PredictSettings(labels="cat, potted plant", affinity_at="10,20")
    assert settings.labels == ("cat", "potted plant") and settings.affinity_at == (10, 20)
    for wrong in ("10", "10,x", "1,2,3"):
        with pytest.raises(ValueError, match="affinity_at: expected a pixel Y,X"):
            PredictSettings(affinity_at=wrong)


def test_bad_arguments_are_named(root):
    with pytest.raises(ValueError, match="labels: 'unicorn'; expected some of aeroplane"):
        run(root, labels=("cat", "unicorn"))
    with pytest.raises(ValueError, match="labels: 'background'"):
        run(root, labels=("background",))
    with pytest.raises(ValueError, match="class_names: expected the model's 21 names, got 3"):
        predict(ColorModel(), [root / "JPEGImages"], root / "out", ("background", "a", "b"))


def test_folders_are_searched_in_order_and_nothing_comes_twice(root):
    names = [path.name for path in photos([root / "JPEGImages" / "2007_000001.jpg", root / "JPEGImages"])]
    assert names == ["2007_000001.jpg", "2007_000000.jpg"]


def test_the_weights_of_the_heads_are_drawn(root):
    torch.manual_seed(0)
    tiny = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}
    model = AFA("mit_b0", 5, embedding=16, backbone_args=tiny)
    path = draw_head_weights(model, root / "new" / "weights.png")
    before = path.read_bytes()
    assert draw_head_weights(model, path).read_bytes() == before
    with torch.no_grad():
        model.attn_proj.weight[0, 5] *= -3
    assert draw_head_weights(model, path).read_bytes() != before
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 300


def test_a_cnn_predicts_its_refined_cam(root):
    torch.manual_seed(0)
    model = AFA("resnet18", 21, stride=(4, 2, 2, 1))
    settings = PredictSettings(**SMALL, labels=("cat",))
    (item, _) = predict(model, [root / "JPEGImages"], root / "out", VOC_CLASSES, settings)
    assert set(read_label(item.label).unique().tolist()) <= {0, 8} and item.panel.exists()
    with pytest.raises(ValueError, match="head_weights: resnet18 has no attention"):
        draw_head_weights(model, root / "weights.png")
    with pytest.raises(ValueError, match="crf: the backbone resnet18 has no decoder"):
        predict(model, [root], root / "out", VOC_CLASSES, PredictSettings(crf=True))
    with pytest.raises(ValueError, match="affinity_at: the backbone resnet18 has no attention"):
        predict(model, [root], root / "out", VOC_CLASSES, PredictSettings(affinity_at=(0, 0)))


def test_what_cannot_be_written_does_not_end_a_folder(root, monkeypatch):
    write = predict_module.write_label

    def full(target, label):
        if target.name == "2007_000000.png":
            raise OSError(errno.ENAMETOOLONG, "File name too long", str(target))
        write(target, label)

    monkeypatch.setattr(predict_module, "write_label", full)
    (bad, good) = run(root)
    assert bad.problem.endswith("2007_000000.jpg: not all of it can be written (File name too long)")
    assert good.label.exists()
    beside = root / "JPEGImages" / "2007_000001_panel.jpg"
    shutil.copy(root / "JPEGImages" / "2007_000001.jpg", beside)
    assert len(run(root, [root / "JPEGImages" / "2007_000001.jpg", beside], panels=False)) == 2
