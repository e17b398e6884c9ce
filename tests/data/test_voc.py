"""Data sets in VOC layout: labels from every source, every broken file named, an order that resumes."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.voc_factory import make_voc, write_xml

from afa_model.data import classes
from afa_model.data.classes import COCO_CLASSES, VOC_CLASSES, class_names, voc_palette
from afa_model.data.datasets import DataSettings, EvaluationSet, TrainingSet
from afa_model.data.files import read_label, read_photo, write_label
from afa_model.data.lists import read_split
from afa_model.data.order import ResumableBatchSampler, training_loader
from afa_model.data.transforms import AugmentSettings
from afa_model.errors import DataError

SMALL = AugmentSettings(crop=32)


@pytest.fixture
def root(tmp_path):
    make_voc(tmp_path)
    return tmp_path


def settings(root, **changes) -> DataSettings:
    return DataSettings(root=str(root), num_workers=0, **changes)


def labels_from_masks(root) -> torch.Tensor:
    return TrainingSet(settings(root, label_source="masks"), SMALL).labels


# names and files


def test_class_names_of_known_data_sets():
    assert len(class_names("voc")) == 21 and len(class_names("coco")) == 81
    assert class_names("voc")[15] == "person" and class_names("coco")[1] == "person"
    assert len(set(COCO_CLASSES)) == 81 and VOC_CLASSES[0] == COCO_CLASSES[0] == "background"


def test_class_names_from_classes_txt(tmp_path):
    assert class_names(tmp_path, 21) == VOC_CLASSES and class_names(tmp_path, 81) == COCO_CLASSES
    with pytest.raises(DataError, match=r"classes\.txt"):
        class_names(tmp_path, 4)
    (tmp_path / "classes.txt").write_text("disc\nring\nbar\n\n")
    assert class_names(tmp_path, 4) == ("background", "disc", "ring", "bar")
    with pytest.raises(DataError, match="num_classes is 21"):
        class_names(tmp_path, 21)
    (tmp_path / "classes.txt").write_text("background\ndisc\ndisc\n")
    with pytest.raises(DataError, match="named twice: disc"):
        class_names(tmp_path)


def test_palette_is_vocs():
    palette = voc_palette()
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for index, color in known.items():
        assert tuple(palette[index]) == color
    assert len({tuple(color) for color in palette}) == 256


def test_label_png_keeps_raw_indices(tmp_path):
    label = torch.arange(256).view(8, 32)
    write_label(tmp_path / "deep" / "x.png", label)
    assert torch.equal(read_label(tmp_path / "deep" / "x.png"), label)
    with Image.open(tmp_path / "deep" / "x.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image.convert("RGB"))[0, 15], voc_palette()[15])
    with pytest.raises(ValueError, match="label: expected"):
        write_label(tmp_path / "y.png", label + 1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_photographs_of_other_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (7, 5), (153, 153, 153)).convert(mode).save(
        path := tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    )
    photo = read_photo(path)
    assert photo.shape == (3, 5, 7) and photo.dtype == torch.uint8
    assert (photo.int() - 153).abs().max() <= 2


def test_split_formats(root):
    names = [f"2007_{i:06d}" for i in range(6)]
    assert read_split(root, "train_aug") == names
    lists = root / "ImageSets" / "Segmentation"
    (lists / "paths.txt").write_text(
        "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in names)
    )
    assert read_split(root, "paths") == names
    assert read_split(root, str(lists / "paths.txt")) == names
    (lists / "folders.txt").write_text("train2014/a\n")
    assert read_split(root, "folders") == ["train2014/a"]
    with pytest.raises(DataError, match=r"'trian'.*lists there: folders, paths, train_aug, val"):
        read_split(root, "trian")
    (lists / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"listed twice\n  a \(lines 1, 3\)$"):
        read_split(root, "twice")
    with pytest.raises(DataError, match="not a folder"):
        read_split(root / "nowhere", "val")


def test_images_in_sub_folders(root):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (root / folder / "train2014").mkdir()
        (root / folder / f"2007_000001.{suffix}").rename(root / folder / "train2014" / f"a.{suffix}")
    (root / "ImageSets" / "Segmentation" / "sub.txt").write_text("train2014/a\n")
    sample = TrainingSet(settings(root, train_split="sub"), SMALL)[0, 3]
    assert sample["name"] == "train2014/a" and sample["cls_labels"].sum() == 2


# labels


def test_every_source_gives_the_same_labels(root):
    names = make_voc(root, xml=True)
    truth = labels_from_masks(root)
    assert truth.shape == (6, 20) and truth[0, 0] == 1 and truth[1].sum() == 2

    np.save(root / "onehot.npy", {name: row.numpy() for name, row in zip(names, truth)})
    np.save(
        root / "numbered.npy", {2007_000000 + i: row.numpy().astype(np.uint8) for i, row in enumerate(truth)}
    )
    (root / "hot.json").write_text(json.dumps({name: row.tolist() for name, row in zip(names, truth)}))
    by_name = {name: [VOC_CLASSES[i + 1] for i in row.nonzero().flatten()] for name, row in zip(names, truth)}
    (root / "named.json").write_text(json.dumps(by_name))
    for file in ("onehot.npy", "numbered.npy", "hot.json", "named.json"):
        data = TrainingSet(settings(root, label_file=file), SMALL)
        assert data.label_source == "file" and torch.equal(data.labels, truth), file
    assert torch.equal(TrainingSet(settings(root, label_source="xml"), SMALL).labels, truth)


def test_auto_takes_file_before_xml_before_masks(root):
    assert TrainingSet(settings(root), SMALL).label_source == "masks"
    names = make_voc(root, xml=True)
    assert TrainingSet(settings(root), SMALL).label_source == "xml"
    np.save(root / "cls_labels_onehot.npy", {name: np.eye(20)[3] for name in names})
    data = TrainingSet(settings(root), SMALL)
    assert data.label_source == "file" and (data.labels[:, 3] == 1).all()
    assert EvaluationSet(settings(root)).label_source == "masks"


def test_training_never_needs_masks_when_labels_come_from_elsewhere(root):
    names = make_voc(root, xml=True)
    for name in names:
        (root / "SegmentationClassAug" / f"{name}.png").unlink()
    (root / "SegmentationClassAug").rmdir()
    sample = TrainingSet(settings(root), SMALL)[0, 0]
    assert set(sample) == {"image", "cls_labels", "img_box", "name"}
    with pytest.raises(DataError, match="evaluation needs masks"):
        EvaluationSet(settings(root))


def test_label_file_that_would_run_code_is_refused(root):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the label file ran code",))

    np.save(root / "evil.npy", np.array({"2007_000000": Evil()}, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="only dicts of arrays are read"):
        TrainingSet(settings(root, label_file="evil.npy"), SMALL)


@pytest.mark.parametrize("content", [pickle.dumps({}), b"", b"{broken"])
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_unreadable_label_file_is_named(root, content, suffix):
    path = root / f"labels.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"label_file .*labels.{suffix} cannot be read"):
        TrainingSet(settings(root, label_file=str(path)), SMALL)


def test_missing_sources_are_named(root):
    with pytest.raises(DataError, match=r"label_file .*gone\.npy not found"):
        TrainingSet(settings(root, label_file="gone.npy"), SMALL)
    with pytest.raises(DataError, match="label_source is 'file'"):
        TrainingSet(settings(root, label_source="file"), SMALL)


def test_bad_entries_of_a_label_file_are_listed(root):
    entries = {f"2007_{i:06d}": [1] + [0] * 19 for i in range(6)}
    entries["2007_000000"] = [0] * 20
    entries["2007_000001"] = [1, 0]
    entries["2007_000002"] = ["cat", "unicorn"]
    entries["2007_000003"] = [2] + [0] * 19
    del entries["2007_000004"]
    (root / "cls_labels.json").write_text(json.dumps(entries))
    with pytest.raises(DataError) as caught:
        TrainingSet(settings(root), SMALL)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for words in ("empty annotation", "expected 20 numbers", "'unicorn'", "no entry in cls_labels.json"):
        assert words in text


# the check


def test_everything_broken_is_listed_at_once(root):
    names = make_voc(root, count=10)
    photos, masks = root / "JPEGImages", root / "SegmentationClassAug"
    (photos / f"{names[0]}.jpg").unlink()
    data = (photos / f"{names[1]}.jpg").read_bytes()
    (photos / f"{names[1]}.jpg").write_bytes(data[: len(data) // 2])
    (photos / f"{names[2]}.jpg").write_bytes(b"no photograph")
    (masks / f"{names[3]}.png").unlink()
    write_label(masks / f"{names[4]}.png", torch.ones(5, 6, dtype=torch.long))
    mask = read_label(masks / f"{names[5]}.png")
    mask[0, 0] = 21
    write_label(masks / f"{names[5]}.png", mask)
    Image.new("RGB", (70, 48), (1, 2, 3)).save(masks / f"{names[6]}.png")
    write_label(masks / f"{names[7]}.png", torch.zeros_like(read_label(masks / f"{names[7]}.png")))
    (masks / f"{names[8]}.png").write_bytes(b"")

    with pytest.raises(DataError) as caught:
        TrainingSet(settings(root), SMALL)
    problems = caught.value.problems
    expected = {
        names[0]: "not found",
        names[1]: "cannot be decoded",
        names[2]: "cannot be decoded",
        names[3]: "not found",
        names[4]: "6x5 pixels, its photograph has 68x48",
        names[5]: "label 21 outside 0..20 and 255",
        names[6]: "image mode RGB",
        names[7]: "empty annotation",
        names[8]: "cannot be decoded",
    }
    assert len(problems) == len(expected)
    for name, words in expected.items():
        assert any(name in line and words in line for line in problems), (name, problems)
    assert "9 of 10 images" in str(caught.value) and all(line in str(caught.value) for line in problems)


def test_broken_annotations_are_listed(root):
    names = make_voc(root, xml=True)
    write_xml(root, names[0], [])
    write_xml(root, names[1], ["unicorn"])
    (root / "Annotations" / f"{names[2]}.xml").write_text("<annotation>")
    (root / "Annotations" / f"{names[3]}.xml").unlink()
    with pytest.raises(DataError) as caught:
        TrainingSet(settings(root, label_source="xml"), SMALL)
    problems = caught.value.problems
    assert len(problems) == 4
    for line, words in zip(problems, ("empty annotation", "unknown class 'unicorn'", "not XML", "not found")):
        assert words in line and line.startswith("Annotations/")


def test_an_evaluation_image_may_show_nothing(root):
    path = root / "SegmentationClassAug" / "2007_000000.png"
    write_label(path, torch.zeros_like(read_label(path)))
    assert EvaluationSet(settings(root))[0]["cls_labels"].sum() == 0


def test_check_can_be_lighter(root):
    path = root / "JPEGImages" / "2007_000001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"2007_000001\.jpg: cannot be decoded"):
        TrainingSet(settings(root), SMALL)
    truth = TrainingSet(settings(root, check="headers"), SMALL).labels
    path.unlink()
    with pytest.raises(DataError, match=r"2007_000001\.jpg: not found"):
        TrainingSet(settings(root, check="headers"), SMALL)
    assert torch.equal(TrainingSet(settings(root, check="off"), SMALL).labels, truth)
    write_label(root / "SegmentationClassAug" / "2007_000002.png", torch.full((48, 66), 30))
    with pytest.raises(DataError, match=r"2007_000002\.png: label 30 outside 0\.\.20"):
        TrainingSet(settings(root, check="off"), SMALL)


# samples


def test_training_sample_format(root):
    sample = TrainingSet(settings(root), SMALL)[1, 5]
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.float32
    assert type(sample["image"]) is torch.Tensor
    assert sample["cls_labels"].dtype == torch.float32 and sample["cls_labels"].sum() == 2
    assert sample["img_box"].dtype == torch.int64 and sample["img_box"].shape == (4,)


def test_evaluation_sample_format(root):
    sample = EvaluationSet(settings(root))[2]
    assert sample["image"].shape == (3, 48, 66) and sample["mask"].shape == (48, 66)
    assert sample["mask"].dtype == torch.int64 and set(sample["mask"].unique().tolist()) == {0, 15, 255}
    assert sample["cls_labels"][14] == 1 and sample["cls_labels"].sum() == 1


def test_other_data_sets_bring_their_class_names(root):
    (root / "classes.txt").write_text("\n".join(f"thing {i}" for i in range(1, 16)))
    data = TrainingSet(settings(root), SMALL)
    assert data.num_classes == 16 and data.class_names[15] == "thing 15" and data.labels.shape == (6, 15)
    assert class_names(data) == data.class_names


# order


def test_each_epoch_shows_every_image_once_in_another_order():
    sampler = ResumableBatchSampler(10, 4, seed=3)
    line = [index for iteration in range(10) for index, _ in sampler.batch(iteration)]
    epochs = [line[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [sampler.epoch(iteration) for iteration in (0, 2, 3, 5)] == [0, 0, 1, 2]
    assert ResumableBatchSampler(10, 4, seed=4).batch(0) != sampler.batch(0)


def test_order_depends_on_the_iteration_alone():
    whole = iter(ResumableBatchSampler(7, 3, seed=1))
    batches = [next(whole) for _ in range(12)]
    resumed = iter(ResumableBatchSampler(7, 3, seed=1, start_iteration=5))
    assert [next(resumed) for _ in range(7)] == batches[5:]
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_ranks_share_one_line():
    one = ResumableBatchSampler(7, 4, seed=1)
    two = [ResumableBatchSampler(7, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for iteration in range(9):
        assert one.batch(iteration) == two[0].batch(iteration) + two[1].batch(iteration)


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"batch_size": 0}, {"seed": -1}, {"rank": 1}, {"start_iteration": -1}]
)
def test_bad_sampler_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ResumableBatchSampler(**{"size": 4, "batch_size": 2, **arguments})


def test_batches_are_the_same_with_any_number_of_workers_and_after_a_resume(root):
    data = TrainingSet(settings(root), SMALL)
    state = torch.random.get_rng_state()

    def batches(workers: int, start: int = 0) -> list[dict]:
        loader = iter(training_loader(data, 2, seed=9, num_workers=workers, start_iteration=start))
        return [next(loader) for _ in range(5 - start)]

    alone, helped, resumed = batches(0), batches(2), batches(2, start=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in [*zip(alone, helped), *zip(alone[3:], resumed)]:
        assert a["name"] == b["name"]
        for key in ("image", "cls_labels", "img_box"):
            assert torch.equal(a[key], b[key])
    assert alone[0]["image"].shape == (2, 3, 32, 32) and alone[0]["img_box"].shape == (2, 4)
    assert not torch.equal(alone[0]["image"], alone[3]["image"])


def test_real_photographs(voc_root):
    train = TrainingSet(DataSettings(root=str(voc_root)), AugmentSettings(crop=128))
    val = EvaluationSet(DataSettings(root=str(voc_root)))
    assert (len(train), len(val)) == (24, 8) and not set(train.names) & set(val.names)
    batch = next(iter(training_loader(train, 4, num_workers=0)))
    assert batch["image"].isfinite().all() and (batch["cls_labels"].sum(1) > 0).all()
    assert val[0]["mask"].shape == val[0]["image"].shape[1:]


def test_another_data_set_of_as_many_classes_takes_no_names_away(tmp_path, monkeypatch):
    monkeypatch.setitem(classes._KNOWN_CLASSES, "other", ("background", *(f"c{i}" for i in range(1, 21))))
    assert class_names(tmp_path) == class_names(tmp_path, 21) == VOC_CLASSES
    assert class_names("other")[1] == "c1"
