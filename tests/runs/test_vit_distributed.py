"""Two processes train a Vision Transformer as one would: with a patch contrast, and with a frozen backbone."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import forked
from support.tiny_step import ALL, batch, small_vit

from afa_model.runtime.processes import Here, data_parallel
from afa_model.training.losses import patch_contrast_loss
from afa_model.training.step import TrainingStep

STEP, LABELS = ALL
LABELS = dataclasses.replace(LABELS, high_score=0.4, low_score=0.3)
NUMBERS = ("loss", "cls_loss", "aux_loss", "contrast_loss", "seg_loss", "aff_loss")


def share(here: Here, seed: int) -> dict:
    return {name: value.chunk(here.world_size)[here.rank] for name, value in batch(seed=seed).items()}


def trained(here: Here, freeze: bool) -> dict:
    """A step of each phase -> losses and weights."""
    model = small_vit(aux_layer=-2, freeze_backbone=freeze, decoder="largefov")
    step = data_parallel(TrainingStep(model, STEP, LABELS), here)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.03)
    numbers = []
    for iteration in range(3):
        optimizer.zero_grad()
        result = step(share(here, iteration), iteration, None)
        result.loss.backward()
        optimizer.step()
        values = [getattr(result, name) for name in NUMBERS]
        numbers.append([float("nan") if value is None else float(value.detach()) for value in values])
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return {"numbers": torch.tensor(numbers, dtype=torch.float64), "weights": weights}


def contrast(here: Here) -> dict:
    """The contrast of two images of which one has hardly a label."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 4, 5, generator=generator)
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    labels[0, :3] = 255
    one = slice(here.rank, here.rank + 1) if here.world_size > 1 else slice(None)
    own = tokens[one].clone().requires_grad_()
    loss, *counts = patch_contrast_loss(own, labels[one], across=True)
    (gradient,) = torch.autograd.grad(loss, own)
    return {"loss": loss.detach(), "counts": torch.stack(counts), "gradient": gradient / here.world_size}


def outcome(here: Here) -> dict:
    return {"learns": trained(here, False), "frozen": trained(here, True), "contrast": contrast(here)}


def _process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.save(outcome(Here(rank, 2, torch.device("cpu"))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict, dict, dict]:
    """Of one process with both images, and of two with one each."""
    folder = tmp_path_factory.mktemp("processes")
    forked.processes(_process, 2, str(folder))
    return outcome(Here(0, 1, torch.device("cpu"))), *(torch.load(folder / f"{i}.pt") for i in range(2))


def test_the_contrast_counts_the_pairs_of_all(outcomes):
    whole, *parts = (found["contrast"] for found in outcomes)
    assert all(torch.equal(part["counts"], whole["counts"]) for part in parts)
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, whole["loss"])
    together = torch.cat([part["gradient"] for part in parts])
    torch.testing.assert_close(together, whole["gradient"], rtol=1e-4, atol=1e-8)
    assert abs(parts[0]["loss"] - parts[1]["loss"]) > 1e-3, "a batch for which it matters"


@pytest.mark.parametrize("kind", ["learns", "frozen"])
def test_two_processes_train_as_one(outcomes, kind):
    whole, *parts = (found[kind] for found in outcomes)
    for part in parts:
        torch.testing.assert_close(part["numbers"], whole["numbers"], rtol=3e-4, atol=1e-6, equal_nan=True)
        for name, want in whole["weights"].items():
            assert torch.equal(part["weights"][name], parts[0]["weights"][name]), name
            assert (part["weights"][name] - want).norm() <= 1e-3 * want.norm() + 1e-6, name
    contrasts = whole["numbers"][:, NUMBERS.index("contrast_loss")]
    assert contrasts.isnan().all() if kind == "frozen" else (contrasts > 0).all()


def test_a_frozen_backbone_stays_the_same_in_all_processes(outcomes):
    before = dict(small_vit(aux_layer=-2, decoder="largefov").named_parameters())
    for found in outcomes:
        weights = found["frozen"]["weights"]
        same = {name for name in before if torch.equal(before[name], weights[name])}
        assert same == {name for name in before if name.startswith("encoder.")}
