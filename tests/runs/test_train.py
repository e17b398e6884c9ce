"""The training loop: what a run leaves behind, how it goes on after a kill, and what stops it."""

from __future__ import annotations

import math
import re
import signal
import subprocess

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support import forked
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.config import parse
from afa_model.errors import CheckpointError, ConfigError, DataError, TrainingError
from afa_model.runs import checkpoint, loop, trainer
from afa_model.runs.checkpoint import CheckpointKeeper
from afa_model.runs.restore import load_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=6)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As in the processes that are forked: sums of several threads are rounded otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def run(root, out, **changes) -> loop.Summary:
    return loop.train(parse(tiny_args(root, out, **changes)))


def in_another_process(arguments: list[str], before: str = "") -> subprocess.CompletedProcess:
    """``afa train`` as its own process, after the Python code ``before``."""

    def train() -> int:
        exec(before, {"checkpoint": checkpoint, "loop": loop})
        return cli.main(["train", *arguments])

    return forked.run(train)


def test_a_run_leaves_logs_pictures_checkpoints_and_its_settings(root, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run(root, out, eval__every=2, log__pictures_every=2, log__tensorboard=True)

    printed = capsys.readouterr().out
    assert "mit_b0" in printed and "6 training images" in printed
    assert "iter 4/4" in printed and "ETA" in printed and "evaluation after step 4, mIoU in percent: CAM " in printed
    steps = rows(out / "train.csv")
    assert [row["iteration"] for row in steps] == ["1", "2", "3", "4"]
    assert all(math.isfinite(float(row["loss"])) and float(row["grad_norm"]) > 0 for row in steps)
    assert float(steps[0]["lr"]) == pytest.approx(6e-11)
    assert float(steps[1]["lr"]) == pytest.approx(6e-5 * 3 / 4)
    evaluations = rows(out / "eval.csv")
    assert [row["iteration"] for row in evaluations] == ["2", "4"]
    assert {"cam", "refined_cam", "random_walk", "segmentation"} <= set(evaluations[0])
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "iter_00000002_training.png",
        "iter_00000004_training.png",
    ]
    assert parse(["--config", str(out / "config.yaml")]).schedule.max_iters == 4
    assert (summary.iteration, summary.checkpoint) == (4, out / "iter_00000004.pt")
    assert summary.scores.keys() >= {"cam", "segmentation"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "eval/segmentation"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["training"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]

    restored = load_model(out)
    assert restored.path == out / "best.pt"
    assert restored.class_names[15] == "person"
    assert not restored.model.training


def test_a_killed_run_goes_on_to_the_same_losses_bit_for_bit(root, tmp_path, capsys):
    settings = {"schedule__max_iters": 8, "checkpoint__every": 3, "eval__every": 4, "log__pictures_every": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)  # as in the other process: sums split by thread have other roundings
    run(root, whole, **settings)

    # SIGKILL with half of the second checkpoint (the one of the evaluation after step 4) on the disk
    kill = """
import io, os, signal
real = checkpoint.torch.save
def save(value, file):
    if value["progress"]["iteration"] == 4:
        whole = io.BytesIO()
        real(value, whole)
        file.write(whole.getvalue()[:100_000])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(value, file)
checkpoint.torch.save = save
"""
    dead = in_another_process(tiny_args(root, killed, **settings), kill)
    assert dead.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoint.checkpoints(killed)] == ["iter_00000003.pt"]
    assert len(rows(killed / "train.csv")) == 4  # one step more than the checkpoint knows

    capsys.readouterr()
    run(root, killed, resume="auto", **settings)
    said = capsys.readouterr().out
    assert "resumed from" in said and "3 steps are done" in said and "warning" not in said
    assert re.search(r"process \d+ on \S+, which had this folder, is gone: taken over", said)
    assert rows(killed / "train.csv") == rows(whole / "train.csv")
    assert rows(killed / "eval.csv") == rows(whole / "eval.csv")
    ends = [checkpoint.read(folder / "iter_00000008.pt") for folder in (whole, killed)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name
    assert not list(killed.glob(".*"))  # the half-written file is gone


def test_a_run_evaluates_by_its_own_protocol(root, tmp_path, monkeypatch, capsys):
    """"training" unless it says otherwise; the best score of another evaluation does not count at a resume, that of
    one with other batches does.
    """
    seen, real = [], trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *a: seen.append(a[2].protocol) or real(*a))
    run(root, tmp_path / "run", eval__every=1, schedule__max_iters=1)
    state = checkpoint.read(tmp_path / "run" / "iter_00000001.pt")
    state["progress"]["best"] = 99.0
    torch.save(state, tmp_path / "run" / "iter_00000001.pt")
    best = tmp_path / "run" / "best.pt"
    for protocol, better in ((None, False), ("test", True)):
        best.unlink(missing_ok=True)
        changes = {"eval__protocol": protocol} if protocol else {"eval__batch": 2, "eval__channels_last": True}
        resume = tmp_path / "run" / "iter_00000001.pt"
        out = tmp_path / f"again {protocol}"
        run(root, out, eval__every=1, schedule__max_iters=2, schedule__warmup_iters=1, resume=resume, **changes)
        assert (out / "best.pt").exists() == better
    assert seen == ["training", "training", "test"]
    assert capsys.readouterr().out.count("the best so far does not count") == 1


def test_sigterm_saves_and_resume_goes_on(root, tmp_path):
    out = tmp_path / "run"
    stop = """
import os, signal
real = loop.Trainer.update
def update(self, *rest):
    result = real(self, *rest)
    if self.progress.iteration == 3:
        for _ in range(2):  # as timeout, scancel and systemd do: the processes that load data get it too
            os.killpg(0, signal.SIGTERM)
    return result
loop.Trainer.update = update
os.setsid()
"""
    arguments = tiny_args(root, out, checkpoint__every=100, data__num_workers=2)
    stopped = in_another_process(arguments, stop)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped by signal 15 after step 3" in stopped.stdout
    assert run(root, out, checkpoint__every=100, resume="auto").iteration == 4
    assert len(rows(out / "train.csv")) == 4


def test_a_folder_with_a_run_is_not_overwritten(root, tmp_path):
    out = tmp_path / "run"
    run(root, out, schedule__max_iters=2)
    before = (out / "iter_00000002.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"out: .* holds a run already .*--resume auto"):
        run(root, out)
    assert (out / "iter_00000002.pt").read_bytes() == before


def test_resume_tells_what_has_changed(root, tmp_path, capsys):
    run(root, tmp_path / "a", schedule__max_iters=2)
    summary = run(
        root,
        tmp_path / "b",
        resume=tmp_path / "a" / "iter_00000002.pt",
        schedule__max_iters=3,
        optim__lr=1e-3,
    )
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: optim.lr 6e-05 -> 0.001, schedule.max_iters 2 -> 3" in printed
    assert summary.iteration == 3
    assert [row["iteration"] for row in rows(tmp_path / "b" / "train.csv")] == ["3"]


def test_a_checkpoint_of_an_earlier_version_loads_and_goes_on(root, tmp_path, capsys):
    """Its configuration has the names of its day; weights, optimizer and random states are as they were."""
    run(root, tmp_path / "a", schedule__max_iters=2)
    path = tmp_path / "a" / "iter_00000002.pt"
    state = checkpoint.read(path)
    config = state["config"]
    labels = config.pop("labels")
    same = ("radius", "cam_scales", "high_score", "low_score", "walk_power", "walk_eps")
    config["step"] |= {name: labels[name] for name in same}
    config["step"] |= {"par_dilations": labels["dilations"], "par_iters": labels["num_iter"]}
    config["step"] |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    scored = {new: config["eval"].pop(new) or labels[new] for new in ("cam_scales", "radius", "dilations", "num_iter")}
    config["eval"] |= {"par_dilations": scored.pop("dilations"), "par_iterations": scored.pop("num_iter"), **scored}
    config["eval"]["bkg_score"] = 0.4
    torch.save(state, path)
    restored = load_model(path)
    assert restored.config.labels.num_iter == 2 and restored.config.labels.bkg_score == 0.4
    run(root, tmp_path / "b", resume=path, schedule__max_iters=3)  # the score of evaluation is not its course
    assert "changed since the checkpoint: schedule.max_iters 2 -> 3\n" in capsys.readouterr().out


def test_settings_from_elsewhere_are_said_to_be_the_checkpoints(root, tmp_path):
    run(root, tmp_path / "a", schedule__max_iters=1)
    path = tmp_path / "a" / "iter_00000001.pt"
    state = checkpoint.read(path)
    state["config"]["optim"]["momentum"] = 0.9
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"the checkpoint's settings .*optim\.momentum"):
        run(root, tmp_path / "b", resume=path, schedule__max_iters=2)


@pytest.mark.parametrize(("kinds", "backbone"), [("[foo]", "mit_b0"), ("[]", "mit_b0"), ("[segmentation]", "resnet18")])
def test_kinds_that_cannot_be_scored_are_refused_before_the_first_step(root, tmp_path, kinds, backbone):
    with pytest.raises(ConfigError, match=r"^eval\.kinds: "):
        run(root, tmp_path / "run", eval__kinds=kinds, eval__every=2, model__backbone=backbone)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_scores_are_told_with_the_refinement_that_was_used(root, tmp_path, capsys):
    run(root, tmp_path / "run", labels__refinement="pamr", eval__every=1, schedule__max_iters=1)
    assert ", CAM + PAMR " in capsys.readouterr().out


def test_evaluation_in_a_run_makes_labels_as_its_steps_do(root, tmp_path, monkeypatch):
    seen = []
    real = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: seen.append(args) or real(*args))
    changes = {"labels__walk_power": 5.0, "labels__bkg_score": 0.2, "eval__every": 2}
    run(root, tmp_path / "run", schedule__max_iters=2, **changes)
    (_, _, settings, labels, _), = seen
    assert (labels.walk_power, labels.bkg_score, labels.radius) == (5.0, 0.2, 2)
    assert settings.labels(labels).walk_power == 5.0


def test_resume_refuses_another_model(root, tmp_path):
    run(root, tmp_path / "a", schedule__max_iters=1)
    path = tmp_path / "a" / "iter_00000001.pt"
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        run(root, tmp_path / "b", resume=path, model__backbone="mit_b1")


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(root, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=r"step \d: not finite: loss .*images 2007_.*the batch is in"
    ) as error:
        run(root, out, optim__lr=1e30, schedule__warmup_iters=0, checkpoint__every=1)
    (saved,) = out.glob("not_finite_*.pt")
    assert str(saved) in str(error.value)
    content = torch.load(saved, weights_only=True)
    assert content["batch"]["image"].shape == (2, 3, 64, 64)
    assert not all(
        math.isfinite(value) for name, value in content["values"].items() if "loss" in name or "grad" in name
    )
    newest = checkpoint.checkpoints(out)[0]
    assert checkpoint.read(newest)["progress"]["iteration"] == content["iteration"]  # from before that step


def test_labels_that_are_all_ignored_give_a_finite_loss(root, tmp_path):
    # no pixel is background under the low score 0, none is foreground under the high score 1
    run(root, tmp_path / "run", labels__low_score=0, labels__high_score=1.0)
    steps = rows(tmp_path / "run" / "train.csv")[1:]
    assert [float(row["seg_loss"]) for row in steps] == [float(row["aff_loss"]) for row in steps] == [0, 0, 0]
    assert {(float(row["pos_count"]), float(row["neg_count"])) for row in steps} == {(1, 1)}
    for row in steps:  # the classifier goes on learning, and the energy needs no labels
        learned = float(row["cls_loss"]) + 0.01 * float(row["reg_loss"])
        assert float(row["reg_loss"]) < 0 and float(row["loss"]) == pytest.approx(learned, abs=1e-6)


def test_the_cam_only_baseline_trains(root, tmp_path):
    run(root, tmp_path / "run", model__backbone="resnet18", eval__every=4, log__pictures_every=4)
    steps = rows(tmp_path / "run" / "train.csv")
    assert all(row["loss"] == row["cls_loss"] for row in steps)
    assert all(row["seg_loss"] == row["aff_loss"] == row["reg_loss"] == "" for row in steps)
    assert all(0 < float(row["loss"]) < 2 for row in steps), "near the ln 2 of a classifier that knows nothing"
    columns = {"iteration", "cam", "refined_cam", "classifier_f1", "classifier_map"}
    assert set(rows(tmp_path / "run" / "eval.csv")[0]) == columns


def test_data_that_is_broken_is_listed_before_anything_starts(tmp_path):
    make_voc(tmp_path / "voc", count=6)
    (tmp_path / "voc" / "JPEGImages" / "2007_000001.jpg").unlink()
    mask = tmp_path / "voc" / "SegmentationClassAug" / "2007_000004.png"
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(DataError) as error:
        run(tmp_path / "voc", tmp_path / "run", eval__every=2)
    assert "2007_000001.jpg" in str(error.value) and "2007_000004.png" in str(error.value)
    assert "train_aug" in str(error.value) and "'val'" in str(error.value)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_folder_that_cannot_be_written_is_found_out_at_once(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*file/run cannot be written"):
        run(root, tmp_path / "file" / "run")


def test_a_full_disk_does_not_end_a_run_but_is_told(root, tmp_path, capsys, monkeypatch):
    real = CheckpointKeeper.save

    def full_at_2(self, state, is_best=False):
        if state["progress"]["iteration"] == 2:
            raise CheckpointError("could not write iter_00000002.pt: No space left on device")
        return real(self, state, is_best)

    monkeypatch.setattr(CheckpointKeeper, "save", full_at_2)
    summary = run(root, tmp_path / "run", checkpoint__every=1)
    printed = capsys.readouterr().out
    assert "No space left on device; the last good checkpoint is" in printed
    assert summary.iteration == 4
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == [
        "iter_00000004.pt",
        "iter_00000003.pt",
    ]


def test_gradient_clipping_shortens_the_step(root, tmp_path):
    # AdamW's first step does not depend on the gradient's length; its moments do
    moments = []
    for name, clip in (("free", "null"), ("clipped", 1e-3)):
        run(root, tmp_path / name, schedule__max_iters=1, optim__clip_norm=clip)
        saved = checkpoint.read(tmp_path / name / "iter_00000001.pt")["optimizer"]
        learning = [index for group in saved["param_groups"] if group["lr_scale"] > 0 for index in group["params"]]
        squares = [float(saved["state"][index]["exp_avg"].square().sum()) for index in learning]
        moments.append(math.sqrt(sum(squares)) / 0.1)
    assert moments[1] == pytest.approx(1e-3, rel=1e-3)
    assert moments[0] > 1


def test_unknown_backbone_is_named(root, tmp_path):
    with pytest.raises(ConfigError, match=r"model.*mit_b9"):
        run(root, tmp_path / "run", model__backbone="mit_b9")


def test_cuda_is_refused_where_there_is_none(root, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="device: cuda was asked for"):
        run(root, tmp_path / "run", device="cuda")


@pytest.mark.cuda
def test_bfloat16_on_cuda(root, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run(root, tmp_path / "run", device="cuda", amp="bf16", eval__every=4, channels_last=True)
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run" / "train.csv"))
