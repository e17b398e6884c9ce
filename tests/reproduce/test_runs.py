"""Networks of a sweep: a shared start changes nothing, a killed run goes on, a folder is one network's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc

from afa_model.config import parse
from afa_model.reproduce.runs import identity, run_of
from afa_model.runs.checkpoint import read
from afa_model.runs.loop import train
from afa_model.runs.trainer import Trainer

ROW = {"labels.radius": 1, "labels.high_score": 0.7, "step.seg_weight": 0.5, "loss.regularisation": 1e6}
CAM_STEPS, STEPS = 2, 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    make_voc(folder / "voc", count=4)
    short = {"schedule__max_iters": STEPS, "step__cam_iters": CAM_STEPS - 1, "step__aff_iters": 2}
    return parse(tiny_args(folder / "voc", folder / "runs", checkpoint__every=1, **short))


@pytest.fixture(scope="module")
def unbroken(base):
    """Every step of a row in one run."""
    config = replace(run_of(base, ROW, 3).config, out=f"{base.out}/unbroken")
    train(config)
    return config


def last(folder):
    return read(folder / f"iter_{STEPS:08d}.pt")


def assert_the_same(run, unbroken):
    """From the branch on every loss, and at the end every weight, to the last bit."""
    whole = rows(type(run.folder)(unbroken.out) / "train.csv")
    assert len(whole) == STEPS and rows(run.folder / "train.csv") == whole[CAM_STEPS:]
    mine, other = last(run.folder)["model"], last(type(run.folder)(unbroken.out))["model"]
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_a_branch_is_the_unbroken_run_even_when_killed_on_the_way(base, unbroken, monkeypatch):
    run = run_of(base, ROW, 3)
    update, killed = Trainer.update, []

    def dies(trainer, norm):
        if trainer.progress.iteration == 3 and not killed:
            killed.append(True)
            raise MemoryError
        return update(trainer, norm)

    monkeypatch.setattr(Trainer, "update", dies)
    with pytest.raises(MemoryError):
        run.make()
    assert killed and not run.finished
    start = run.start()
    assert [row["iteration"] for row in rows(start.folder / "train.csv")] == ["1", "2"]
    before = (start.folder / "train.csv").stat().st_mtime_ns
    run.make()
    assert run.finished
    assert (start.folder / "train.csv").stat().st_mtime_ns == before  # trained once
    assert_the_same(run, unbroken)


def test_rows_that_differ_later_share_a_start_and_others_do_not(base):
    start = run_of(base, ROW, 3).start()
    assert start.folder != run_of(base, ROW, 3).folder
    for settings in ({}, {"labels.radius": 5}, {"step.aff_weight": 0.7}, {"labels.low_score": 0.1}):
        assert run_of(base, settings, 3).start().folder == start.folder
    for settings in ({"augment.crop": 96}, {"optim.lr": 1e-3}, {"step.cam_iters": 2}, {"schedule.max_iters": 9}):
        assert run_of(base, settings, 3).start().folder != start.folder
    assert run_of(base, {}, 4).start().folder != start.folder
    assert run_of(base, {"step.compute_unused": True}, 3).start() is None  # batch norm has learned from that phase
    assert run_of(base, {"step.cam_iters": STEPS - 1, "step.aff_iters": STEPS}, 3).start() is None


def test_the_folder_tells_networks_apart_by_what_they_depend_on(base, tmp_path):
    config = run_of(base, {}, 3).config
    same = [
        replace(config, out="elsewhere", device="cpu", resume="auto"),
        replace(config, log=replace(config.log, every=7), data=replace(config.data, check="off", num_workers=3)),
        replace(config, eval=replace(config.eval, limit=1)),  # scored only when trained
    ]
    assert {identity(one) for one in same} == {identity(config)}
    other = [
        replace(config, seed=4),
        replace(config, data=replace(config.data, root=str(tmp_path))),
        replace(config, labels=replace(config.labels, radius=7)),
        replace(config, eval=replace(config.eval, every=2)),  # which decides what the best checkpoint is
    ]
    assert len({identity(one) for one in [config, *other]}) == 5
    scored = other[-1]
    assert identity(replace(scored, eval=replace(scored.eval, batch=4, channels_last=True))) == identity(scored)
    assert run_of(base, {"labels.radius": 7}, 3).folder.name.startswith("radius-7-s3-")
    assert run_of(base, {}, 3).folder.name.startswith("default-s3-")
