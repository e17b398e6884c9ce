"""Evaluation and prediction with several photographs at a time: what they give one by one, in the order of the list."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support import forked
from support.color_model import ColorModel
from support.voc_factory import make_voc

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.datasets import DataSettings, EvaluationSet
from afa_model.errors import DataError
from afa_model.evaluation.evaluate import EvaluateSettings, evaluate
from afa_model.evaluation.predict import PredictSettings, predict
from afa_model.labels.settings import LabelSettings
from afa_model.runtime.progress import several

COUNT = 7
# Photographs of 48 x 64, 48 x 65, ... 48 x 70 then have 30, 29, 29, 28, 28, 27 and 27 rows.
SIZES = {"long_side": 40, "scales": (1.0, 0.5), "progress": False}
HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=3, dilations=(1, 2), num_iter=2)


class Counting(ColorModel):
    """How many images go through it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def _shares(self, images, cell=4):
        self.passes.append(len(images))
        return super()._shares(images, cell)


@pytest.fixture
def root(tmp_path):
    make_voc(tmp_path, count=COUNT)
    return tmp_path


@pytest.fixture
def data(root) -> EvaluationSet:
    return EvaluationSet(DataSettings(root=str(root)))


def scored(data, batch=1, model=None, stop=lambda: False, **changes):
    return evaluate(model or ColorModel(), data, EvaluateSettings(**{**SIZES, **changes}, batch=batch), HOW, stop)


def same_scores(got, want) -> None:
    assert got.images == want.images and list(got.scores) == list(want.scores)
    for kind, scores in want.scores.items():
        assert scores.confusion.sum() > 0 and torch.equal(got[kind].confusion, scores.confusion), kind
    assert got.image_level == want.image_level


def test_items_come_in_their_order_and_are_not_asked_for_before():
    asked = []

    def items():
        for item in range(5):
            asked.append(item)
            yield item

    taken = several(items(), 2)
    assert next(taken) == [0, 1] and asked == [0, 1]
    assert list(taken) == [[2, 3], [4]] and list(several([], 3)) == [] and list(several("ab", 5)) == [["a", "b"]]


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_scores_are_those_of_one_by_one(data, batch):
    """The last batch is smaller than the others, or the only one larger than the list."""
    want, model = scored(data), Counting()
    same_scores(scored(data, batch, model), want)
    assert max(model.passes) == (2 if batch == 2 else 4), "two are of one size, and have mirror images"


def test_the_photographs_own_sizes_are_not_padded(data):
    model = Counting()
    same_scores(scored(data, 4, model, long_side=0), scored(data, long_side=0))
    assert max(model.passes) == 2, "each has a size of its own"


def _evaluate_in_group(rank: int, root: str, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(scored(EvaluationSet(DataSettings(root=root)), 3), f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_count_every_image_once(data, tmp_path):
    """One has four photographs, the other three."""
    want = scored(data)
    forked.processes(_evaluate_in_group, 2, str(data.root), str(tmp_path / "store"), str(tmp_path / "out"))
    for rank in range(2):
        same_scores(torch.load(f"{tmp_path / 'out'}{rank}", weights_only=False), want)


def test_evaluation_is_given_up_between_batches(data):
    asked, model = [], Counting()
    assert scored(data, 3, model, stop=lambda: len(asked) == 1 or asked.append(None)) is None
    one_batch = Counting()
    scored(data, 3, one_batch, limit=3)
    assert model.passes == one_batch.passes
    asks = []
    scored(data, 3, stop=lambda: asks.append(None))
    assert len(asks) == math.ceil(COUNT / 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_photograph_that_broke_is_named_in_evaluation(data, root, num_workers):
    (root / "JPEGImages" / "2007_000002.jpg").write_bytes(b"no photograph any more")
    with pytest.raises(DataError, match=r"2007_000002\.jpg") as caught:
        scored(data, 4, num_workers=num_workers)
    assert "2007_000001" not in str(caught.value) and "2007_000003" not in str(caught.value)


def predicted(root, out, batch, model=None, **changes):
    settings = PredictSettings(**{**SIZES, "panels": False, **changes}, batch=batch)
    return predict(model or ColorModel(), [root / "JPEGImages"], out, VOC_CLASSES, settings, HOW)


def same_files(got, want) -> None:
    assert [item.image for item in got] == [item.image for item in want]
    assert [item.problem for item in got] == [item.problem for item in want]
    for one, alone in zip(got, want):
        assert [name for name, _ in one.found] == [name for name, _ in alone.found]
        assert [score for _, score in one.found] == pytest.approx([score for _, score in alone.found])
        if alone.label is not None:
            assert one.label.name == alone.label.name
            assert np.array_equal(*(np.asarray(Image.open(item.label)) for item in (one, alone)))


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_labels_are_those_of_one_by_one_and_a_broken_photograph_is_told(root, tmp_path, batch):
    """A broken one is no part of what goes through the networks, and keeps no other from its label."""
    broken = root / "JPEGImages" / "2007_000002.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    (root / "JPEGImages" / "2007_000006.jpg").write_text("no photograph")
    want = predicted(root, tmp_path / "one", 1)
    model = Counting()
    got = predicted(root, tmp_path / "several", batch, model)
    same_files(got, want)
    told = [item.problem for item in got]
    assert [number for number, problem in enumerate(told) if problem] == [2, 6]
    assert "2007_000002.jpg: cannot be decoded" in told[2] and "2007_000006.jpg" in told[6]
    assert len({tuple(name for name, _ in item.found) for item in got}) >= 4, "they could be taken for each other"


def test_batches_of_nothing_but_broken_photographs(root, tmp_path):
    for number in (2, 3):
        (root / "JPEGImages" / f"2007_00000{number}.jpg").write_text("no photograph")
    got = predicted(root, tmp_path / "out", 2)
    assert [item.label is None for item in got] == [number in (2, 3) for number in range(COUNT)]


def test_photographs_of_one_size_after_resizing_go_at_once(root, tmp_path):
    for number, size in enumerate([(128, 96), (32, 24), (64, 48), (65, 48)]):
        with Image.open(root / "JPEGImages" / "2007_000001.jpg") as photo:
            photo.resize(size).save(root / f"{number}.png")
    models = Counting(), Counting()
    done = [
        predict(model, sorted(root.glob("*.png")), root / str(batch), VOC_CLASSES, settings, HOW)
        for model, batch, settings in (
            (model, batch, PredictSettings(**SIZES, panels=False, batch=batch)) for model, batch in zip(models, (1, 4))
        )
    ]
    same_files(done[1], done[0])
    assert max(models[0].passes) == 2 and max(models[1].passes) == 6 and sum(models[1].passes) == sum(models[0].passes)
    for item, size in zip(done[1], [(128, 96), (32, 24), (64, 48), (65, 48)]):
        assert Image.open(item.label).size == size


def test_panels_are_those_of_one_by_one(root, tmp_path):
    for number in (0, 3, 4, 5, 6):
        (root / "JPEGImages" / f"2007_00000{number}.jpg").unlink()
    files = [
        [item.panel.read_bytes() for item in predicted(root, tmp_path / str(batch), batch, panels=True)]
        for batch in (1, 2)
    ]
    assert files[0] == files[1] and files[0][0] != files[0][1]


def test_the_weights_are_laid_out_once(root, data, tmp_path):
    """For all photographs, and afterwards as they were."""

    class Convolving(ColorModel):
        laid: list[tuple[int, bool]] = []

        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.zeros(3, 4, 2, 2))

        def _shares(self, images, cell=4):
            last = all(x.is_contiguous(memory_format=torch.channels_last) for x in (images, self.kernel))
            self.laid.append((self.kernel.data_ptr(), last))
            return super()._shares(images, cell)

    model = Convolving()
    before = model.kernel.data_ptr(), model.kernel.stride()
    got = scored(data, 2, model, channels_last=True)
    same_scores(got, scored(data))
    predicted(root, tmp_path / "out", 2, model, channels_last=True)
    assert all(last for _, last in model.laid) and len({where for where, _ in model.laid}) <= 2
    assert (model.kernel.data_ptr(), model.kernel.stride()) == before


@pytest.mark.parametrize("settings", [EvaluateSettings, PredictSettings])
def test_a_batch_has_one_photograph_at_least(settings):
    assert settings().batch == 1 and settings().channels_last is False
    with pytest.raises(ValueError, match="batch: expected at least 1 photograph, got 0"):
        settings(batch=0)


def test_the_segmentation_alone(data):
    """Without a CAM."""
    same_scores(scored(data, 4, kinds=("segmentation",)), scored(data, kinds=("segmentation",)))
