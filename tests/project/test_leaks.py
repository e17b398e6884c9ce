"""Long runs: neither the loading of data nor a training step may hold on to memory, files or tensors."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from support.voc_factory import make_voc

from afa_model.data.datasets import DataSettings, TrainingSet
from afa_model.data.order import training_loader
from afa_model.data.transforms import AugmentSettings
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.training.schedule import build_optimizer
from afa_model.training.step import StepSettings, TrainingStep

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


def resident_mb(process: int) -> float:
    """Memory of a process that is its own, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_three_epochs_keeps_nothing(tmp_path):
    make_voc(tmp_path, count=6)
    data = TrainingSet(DataSettings(root=str(tmp_path), check="off", num_workers=2), AugmentSettings(crop=256))
    epoch, size = 40, 3  # the six images many times over: every epoch decodes and augments 120
    loader = iter(training_loader(data, size))
    me = os.getpid()

    def state() -> tuple[list[float], int]:
        for _ in range(epoch):
            next(loader)
        workers = Path(f"/proc/self/task/{me}/children").read_text().split()
        memory = [resident_mb(process) for process in (me, *map(int, workers))]
        return memory, len(os.listdir("/proc/self/fd"))

    (before, files), *_, (after, files_after) = (state() for _ in range(4))
    assert len(before) == len(after) >= 3
    for old, new in zip(before, after):
        # an epoch's images are 120 x 768 kB = 90 MB: a tenth of them kept over three epochs would show
        assert new - old < 25, f"memory of one epoch {before} MB, three epochs later {after} MB"
    # Two batches of each worker may be on their way, a shared-memory file for each tensor: how many is chance.
    in_flight = 2 * 2 * 6
    assert files_after - files <= in_flight < epoch, f"{files} open files after one epoch, {files_after} three later"


def test_steps_keep_no_tensors():
    torch.manual_seed(0)
    model = AFA("mit_b0", 5, embedding=16, backbone_args=TINY).train()
    step, optimizer = TrainingStep(model, StepSettings(0, 1), LabelSettings(radius=2)), build_optimizer(model)
    example = {"image": torch.randn(2, 3, 64, 64), "cls_labels": torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])}

    def tensors_after(steps: range) -> int:
        for i in steps:
            optimizer.zero_grad()
            step(example, i, everything=True).loss.backward()
            optimizer.step()
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    assert tensors_after(range(3, 6)) >= (count := tensors_after(range(6, 9)))
    assert tensors_after(range(9, 20)) <= count
