"""Several processes train as one would with all their images: losses, counts, gradients, resuming."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import support.needs_command_line  # noqa: F401
import torch
import torch.distributed as dist
from support import forked
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc
from torch import nn

from afa_model import cli
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.runs import checkpoint
from afa_model.runtime.collectives import shown_as_mean, sum_over_processes
from afa_model.runtime.processes import Here, data_parallel
from afa_model.training.losses import affinity_loss, segmentation_loss
from afa_model.training.step import StepSettings, TrainingStep

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4), "drop_path_rate": 0.0}
STEPS = 7
NUMBERS = ("loss", "cls_loss", "seg_loss", "aff_loss", "pos_count", "neg_count")


def batch(step: int) -> dict[str, torch.Tensor]:
    """Two images of quite different content: the second has a small box, and in one step no pixel at all."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(2, 3, 64, 64, generator=generator).clamp(-1.5, 1.5)
    box = torch.tensor([[0, 64, 3, 59], [20, 51, 0, 64]])
    if step == 5:
        box[1] = 0
    return {"image": image, "cls_labels": torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]]), "img_box": box}


def by_own_counts(here: Here) -> dict:
    """One step whose losses each process normalises by its own pixels and pairs, as published."""
    torch.manual_seed(0)
    model = AFA("mit_b0", 5, embedding=16, decoder_dropout=0.0, backbone_args=TINY).train()
    model.decoder.linear_fuse.bn.eval()
    step = TrainingStep(model, StepSettings(1, 3, normalise_across=False), LabelSettings(radius=2))
    result = step({name: value.chunk(here.world_size)[here.rank] for name, value in batch(0).items()}, 4)
    return {name: float(getattr(result, name)) for name in NUMBERS}


def train_steps(here: Here) -> dict:
    """A few steps of all phases on this process's share of the batches -> what came out."""
    torch.manual_seed(0)
    model = AFA("mit_b0", 5, embedding=16, decoder_dropout=0.0, backbone_args=TINY).train()
    model.decoder.linear_fuse.bn.eval()  # its batch would be half as large
    step = data_parallel(TrainingStep(model, StepSettings(1, 3), LabelSettings(radius=2)), here)
    optimizer = torch.optim.SGD(model.parameters(), 0.03)  # Adam would blow up the rounding of gradients near 0
    numbers = []
    for i in range(STEPS):
        share = {name: value.chunk(here.world_size)[here.rank] for name, value in batch(i).items()}
        optimizer.zero_grad()
        result = step(share, i, None)
        result.loss.backward()
        optimizer.step()
        values = [getattr(result, name) for name in NUMBERS]
        numbers.append([float("nan") if v is None else float(v) for v in values])
    return {
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "weights": {name: value.detach() for name, value in model.named_parameters()},
        "losses": _losses(here),
        "own": by_own_counts(here),
    }


def _losses(here: Here) -> dict:
    """Shares of the losses of one batch, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (2, 8, 8), generator=generator)
    labels[0, :6] = 255
    query, key = torch.randn(2, 2, 4, 64, 8, generator=generator)
    head = torch.randn(4, generator=generator), torch.zeros(1)
    one = slice(here.rank, here.rank + 1) if here.world_size > 1 else slice(None)
    inputs = [x[one].clone().requires_grad_() for x in (logits, query, key)]
    seg = segmentation_loss(inputs[0], labels[one], across=True)
    aff, *counts = affinity_loss(*inputs[1:], *head, labels[one], 2, across=True)
    (seg + aff).backward()
    grads = torch.cat([x.grad.flatten() for x in inputs]) / here.world_size  # as DDP averages
    means = shown_as_mean(seg, aff)
    return {"means": [float(v) for v in means], "counts": [int(c) for c in counts], "gradient": grads}


def _process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    here = Here(rank, 2, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Grad strides do not match bucket view strides")
        torch.save(train_steps(here), f"{folder}/{rank}.pt")
    assert sum_over_processes(torch.tensor([1, rank])).tolist() == [2, 1]
    (seen,) = shown_as_mean(torch.tensor(float("nan") if rank else 1.0))
    assert seen.isnan(), "what is not finite in one process stops all of them"
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict, dict, dict]:
    """Of one process with both images, and of two with one each."""
    folder = tmp_path_factory.mktemp("processes")
    forked.processes(_process, 2, str(folder))
    return train_steps(Here(0, 1, torch.device("cpu"))), *(torch.load(folder / f"{i}.pt") for i in range(2))


def test_two_processes_give_the_losses_of_one(outcomes):
    """Through all phases and seven optimizer steps, one of them with an image that has no labelled pixel."""
    whole, *parts = outcomes
    for part in parts:
        torch.testing.assert_close(part["numbers"], whole["numbers"], rtol=3e-4, atol=1e-6, equal_nan=True)
        counts = slice(NUMBERS.index("pos_count"), None)
        assert torch.equal(part["numbers"][2:, counts], whole["numbers"][2:, counts])
    assert (whole["numbers"][2:, 2:] > 0).all(), "the phases should all have been at work"
    assert whole["numbers"][:2, 2:].isnan().all()


def test_two_processes_arrive_at_the_weights_of_one(outcomes):
    whole, *parts = outcomes
    for name, want in whole["weights"].items():
        assert torch.equal(parts[0]["weights"][name], parts[1]["weights"][name]), name
        assert (parts[0]["weights"][name] - want).norm() <= 1e-3 * want.norm() + 1e-6, name


def test_losses_are_normalised_by_the_counts_of_all(outcomes):
    whole, *parts = (outcome["losses"] for outcome in outcomes)
    for part in parts:
        assert part["counts"] == whole["counts"]
        assert part["means"] == pytest.approx(whole["means"], rel=1e-6)
    assert parts[0]["gradient"].shape != whole["gradient"].shape
    halves = [torch.stack([part["gradient"].split([192, 2048, 2048])[i] for part in parts]) for i in range(3)]
    together = torch.cat([half.flatten() for half in halves])
    torch.testing.assert_close(together, whole["gradient"], rtol=1e-4, atol=1e-8)


def test_losses_by_each_process_own_counts(outcomes):
    """Told is their mean, and the pairs of all: each process's loss is that of its image alone."""
    _, *parts = outcomes
    alone = [by_own_counts(Here(rank, 2, torch.device("cpu"))) for rank in range(2)]  # no group: nothing is summed
    for part in parts:
        for name in ("seg_loss", "aff_loss", "loss"):
            assert part["own"][name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-5), name
        for name in ("pos_count", "neg_count"):
            assert part["own"][name] == alone[0][name] + alone[1][name] - 1
    whole = by_own_counts(Here(0, 1, torch.device("cpu")))
    assert abs(parts[0]["own"]["seg_loss"] / whole["seg_loss"] - 1) > 1e-3, "a batch for which it matters"


def test_alone_nothing_is_summed():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(sum_over_processes(values), torch.tensor([1.0, 2.0]))
    assert shown_as_mean(values[0])[0].requires_grad


def test_synchronised_batch_norm_keeps_the_checkpoint():
    """What training on several GPUs does to the model leaves its parameters and their names alone."""
    model = AFA("mit_b0", 5, embedding=16, backbone_args=TINY)
    names = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.decoder.linear_fuse.bn, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == names
    with torch.no_grad():
        assert converted.eval()(torch.randn(1, 3, 64, 64)).seg_logits.shape == (1, 5, 16, 16)


def torchrun(table: Path, kill_at: int, *arguments: str) -> str:
    """What a run says of which one process is killed as soon as ``table`` has a row of step ``kill_at``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--max-restarts", "1", "-m", "afa_model", "train", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        launcher = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while launcher.poll() is None and f"\n{kill_at}," not in table.read_text():
                time.sleep(0.02)
            tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
            children = [int(child) for task in tasks for child in task.read_text().split()]
            os.kill(children[-1], signal.SIGKILL)
            status = launcher.wait(timeout=300)
        finally:
            launcher.kill()
        said.seek(0)
        text = said.read()
    assert status == 0, text
    return text


def _train_as_launched(rank: int, port: int, said: str, arguments: list[str]) -> None:
    """`afa train` with what torchrun announces."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open(f"{said}{rank}", "w") as file, contextlib.redirect_stdout(file):
        assert cli.main(["train", *arguments]) == 0


def test_a_run_of_two_processes_resumes_to_the_same_losses(tmp_path):
    """As a user starts it, with a process killed on the way and all started again."""
    make_voc(tmp_path / "voc", count=6)
    settings = {"loader__batch_size": 1, "checkpoint__every": 2, "schedule__max_iters": 5}
    settings["checkpoint__keep_last"] = 3
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = tiny_args(tmp_path / "voc", whole, **settings)
    forked.processes(_train_as_launched, 2, port, str(tmp_path / "said"), arguments)
    said = "".join(Path(tmp_path, f"said{rank}").read_text() for rank in range(2))
    assert "batch 1 x 2 on cpu" in said
    assert said.count("iter 5/5") == 1, "one of them speaks"
    assert len(rows(whole / "train.csv")) == 5

    resumed.mkdir()
    shutil.copy(whole / "iter_00000002.pt", resumed)
    (resumed / "train.csv").write_text("".join((whole / "train.csv").read_text().splitlines(True)[:3]))
    said = torchrun(resumed / "train.csv", 3, *tiny_args(tmp_path / "voc", resumed, resume="auto", **settings))
    assert "2 steps are done" in said and said.count("steps are done") == 2 and "warning:" not in said
    assert said.count("Traceback") == 0 and said.count("another process ended") <= 1
    assert rows(resumed / "train.csv") == rows(whole / "train.csv")
    ends = [checkpoint.read(folder / "iter_00000005.pt") for folder in (whole, resumed)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name
    states = [state["torch"] for state in ends[0]["random"]]
    assert len(states) == 2
    assert not torch.equal(*states), "each process draws its own noise"
