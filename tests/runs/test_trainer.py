"""What a run is made of: that its settings arrive, and that several processes score one model."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import support.needs_command_line  # noqa: F401
import torch
import torch.distributed as dist
from support import forked
from support.tiny_run import tiny_args
from support.tiny_step import tiny
from support.voc_factory import make_voc
from torch import nn

from afa_model.config import Config, parse
from afa_model.runs import trainer as module
from afa_model.runs.trainer import Trainer
from afa_model.runtime.processes import Here
from afa_model.training.schedule import learning_rate

ALONE = Here(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=2)
    return folder


def test_settings_reach_optimizer_schedule_and_step(root, tmp_path):
    changes = {
        "optim__lr": 1e-3, "optim__head_multiplier": 7, "optim__weight_decay": 0.03, "optim__betas": [0.8, 0.95],
        "schedule__max_iters": 9, "schedule__warmup_iters": 3, "schedule__warmup_ratio": 0.1, "schedule__power": 2,
    }  # fmt: skip
    config = parse(tiny_args(root, tmp_path, **changes))
    trainer = Trainer(config, ALONE)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.95)}
    assert (groups["backbone"]["weight_decay"], groups["heads"]["weight_decay"]) == (0.03, 0.03)
    step = trainer.step
    assert (step.settings, step.labels, step.loss) == (config.step, config.labels, config.loss)
    for iteration in (0, 2, 3, 8):
        trainer.progress.iteration = iteration
        rate = trainer.update(torch.zeros(()))
        assert rate == learning_rate(iteration, 9, 1e-3, 3, 0.1, 2) and trainer.progress.iteration == iteration + 1
        assert (groups["backbone"]["lr"], groups["decoder"]["lr"]) == (rate, 7 * rate)


def test_while_training_the_protocol_is_that_of_training(root, tmp_path, monkeypatch):
    trainer = Trainer(parse(tiny_args(root, tmp_path)), ALONE)
    seen = []
    monkeypatch.setattr(module, "evaluate", lambda model, data, settings, *_: seen.append(settings.protocol))
    assert trainer.evaluate(lambda: False) is None and seen == ["training"]


@pytest.mark.parametrize(
    ("device", "count", "synchronised"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_is_synchronised_between_gpus(monkeypatch, device, count, synchronised):
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # there need be no GPU
    place = SimpleNamespace(config=Config(), here=Here(0, count, torch.device(device)))
    norm = Trainer._place(place, tiny()).decoder.linear_fuse.bn
    assert isinstance(norm, nn.SyncBatchNorm) is synchronised and norm.training


def _evaluates(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = tiny()
    norm = model.decoder.linear_fuse.bn
    norm.running_mean.fill_(rank + 1.0)
    norm.num_batches_tracked.fill_(rank + 1)
    seen = []
    module.evaluate = lambda model, *_: seen.append((norm.running_mean.clone(), norm.num_batches_tracked.clone()))
    Trainer.evaluate(SimpleNamespace(config=Config(), model=model, validation=None), lambda: False)
    torch.save(seen[0], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_several_processes_score_the_model_that_is_saved(tmp_path):
    """The first one's: statistics of batch norm that is not synchronised are each process's own."""
    forked.processes(_evaluates, 2, str(tmp_path))
    for rank in range(2):
        mean, batches = torch.load(tmp_path / f"{rank}.pt")
        assert (mean == 1).all() and batches == 1, rank


@pytest.mark.parametrize("frozen", [True, False])
def test_norms_of_the_backbone_learn_if_asked_to(root, tmp_path, frozen):
    config = parse(tiny_args(root, tmp_path, model__backbone="test_vit", optim__freeze_norms=frozen))
    trainer = Trainer(config, ALONE)
    (norms,) = (group for group in trainer.optimizer.param_groups if group["name"] == "backbone_norms")
    assert norms["lr_scale"] == float(not frozen)
    learning = {id(parameter) for parameter in trainer.learning}
    assert {id(parameter) in learning for parameter in norms["params"]} == {not frozen}
