"""Neither training nor evaluation forms a tensor over all pairs of pixels: no score map, no dense affinity."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from support.common import ROOT, available
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afa_kernels import attention_affinity_loss, use_backend, window_to_dense
from afa_model.labels.evidence import MapSettings
from afa_model.labels.kinds import KINDS
from afa_model.labels.label_maps import label_maps
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.training.step import StepSettings, TrainingStep

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}
HEIGHT, WIDTH, SCALES = 80, 112, (1.0, 0.5, 1.5)
# Pixels of the last stage's grid at each scale: 5x7, 3x4 and 8x11. No other pair of dimensions is twice one of these.
COUNTS = {35, 12, 88}
OPERATORS = ("window_affinity", "attention_affinity_loss", "random_walk")

pytestmark = pytest.mark.skipif(
    any("native" not in available(operator) for operator in OPERATORS),
    reason="no native kernels; the reference path is dense by design",
)


class Pairs(TorchDispatchMode):
    """Notes every tensor of N x N that an operation gives, N the pixels of a grid.

    What kernels do inside is not seen: PyTorch's scaled-dot-product attention, which forms no map either, and ours,
    whose peaks of memory the benchmarks measure.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.found = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            shape = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] in COUNTS:
                self.found.append((str(function), shape))
        return result


def tiny() -> AFA:
    torch.manual_seed(0)
    arguments = {"embedding": 16, "decoder_dropout": 0.1, "backbone_args": TINY}
    return AFA("mit_b0", 5, **arguments).train()


def batch() -> dict:
    return {
        "image": torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)),
        "cls_labels": torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]]),
        "img_box": torch.tensor([[0, HEIGHT, 3, WIDTH - 5], [7, HEIGHT, 0, WIDTH]]),
    }


def settings() -> tuple[StepSettings, LabelSettings]:
    """Iteration 2 is in the phase where everything is at work."""
    return StepSettings(0, 1), LabelSettings(radius=2, cam_scales=SCALES)


def test_training_step_forms_no_pairs():
    step = TrainingStep(tiny(), *settings())
    with use_backend("native"), Pairs() as pairs:
        result = step(batch(), 2)
        result.loss.backward()
    assert result.aff_loss > 0 and pairs.operations > 300
    assert not pairs.found


def test_evaluation_forms_no_pairs():
    sizes, how = MapSettings(None, SCALES), LabelSettings(cam_scales=SCALES, radius=2, dilations=(1, 2))
    image, present = batch()["image"][0], batch()["cls_labels"][0]
    with use_backend("native"), Pairs() as pairs:
        maps = label_maps(tiny(), image, sizes, how, present)
    assert tuple(maps.labels) == tuple(KINDS) and maps.affinity.shape == (25, 8, 11)
    assert not pairs.found


class Kept(TorchDispatchMode):
    """Notes the bytes that the fused loss gives, what it keeps for its backward among them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() == "afa::attention_affinity_loss":
            self.bytes = sum(leaf.nbytes for leaf in tree_leaves(result))
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_loss_keeps_grows_as_the_pixels(recompute):
    """And not as their pairs: four times as many of them have four times the memory, and a little for the edges."""
    sizes = []
    for side in (24, 48):
        query = torch.rand(1, 1, side * side, 4, requires_grad=True)
        labels = torch.zeros(1, side, side, dtype=torch.int64)
        with use_backend("native"), Kept() as kept:
            attention_affinity_loss(query, query, torch.ones(1), torch.ones(1), labels, 2, recompute=recompute)
        sizes.append(kept.bytes)
    if recompute:
        assert sizes == [4 + 8 + 8] * 2  # the loss and its counts
    else:
        assert 24 * 24 < sizes[0] < sizes[1] < 6 * sizes[0]


def test_pairs_would_be_found(monkeypatch):
    """The same step the published way forms them, and so does one call of `window_to_dense`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    step = importlib.import_module("published_step").PublishedStep(tiny(), *settings())
    sys.modules.pop("published_step")
    with Pairs() as pairs:
        step(batch(), 2).loss.backward()
    assert {35, 12, 88} == {shape[-1] for _, shape in pairs.found}
    with Pairs() as pairs:
        window_to_dense(torch.rand(1, 25, 5, 7), 2)
    assert pairs.found
