"""Checkpoints: whole or not there, kept and dropped as asked, and the random states they bring back."""

from __future__ import annotations

import os
import random
import resource

import numpy as np
import pytest
import torch
from support.broken_files import SOMETHING_ELSE, flip_bytes, write_something_else
from torch import nn

from afa_model.errors import CheckpointError
from afa_model.runs import checkpoint
from afa_model.runs.checkpoint import CheckpointKeeper, Progress


def state_at(iteration: int, size: int = 4) -> dict:
    torch.manual_seed(iteration)
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return checkpoint.pack(
        model,
        optimizer,
        Progress(iteration, 1.5),
        [checkpoint.random_state()],
        {"seed": 0},
        ["background", "cat"],
    )


def draw() -> tuple:
    return random.random(), np.random.rand(), float(torch.rand(())), float(torch.randn(()))  # noqa: NPY002


def test_random_states_come_back_from_a_file(tmp_path):
    np.random.standard_normal()  # noqa: NPY002 (leaves a second number in the generator's pocket)
    random.gauss(0, 1)
    path = checkpoint.write_atomically(tmp_path / "a.pt", state_at(3))
    checkpoint.set_random_state(checkpoint.read(path)["random"][0])
    want = draw()
    draw()
    checkpoint.set_random_state(checkpoint.read(path)["random"][0])
    assert draw() == want


def test_kept_random_state_survives_an_exception():
    torch.manual_seed(1)
    state = checkpoint.random_state()
    want = draw()
    checkpoint.set_random_state(state)
    with pytest.raises(KeyError), checkpoint.kept_random_state():
        draw()
        raise KeyError
    assert draw() == want


def test_model_and_optimizer_come_back(tmp_path):
    saved = state_at(5)
    path = checkpoint.write_atomically(tmp_path / "a.pt", saved)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = checkpoint.unpack(checkpoint.read(path), model, optimizer)
    assert progress == Progress(5, 1.5)
    assert torch.equal(model.weight, saved["model"]["weight"])
    moments = optimizer.state[model.weight]
    assert torch.equal(moments["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])
    assert moments["step"] == 1


def test_another_model_is_refused_with_what_does_not_fit(tmp_path):
    model = nn.Linear(5, 5)
    with pytest.raises(CheckpointError, match=r"weight"):
        checkpoint.unpack(state_at(1), model, torch.optim.AdamW(model.parameters()))


def test_newest_are_kept_and_best_outlives_them(tmp_path):
    keeper = CheckpointKeeper(tmp_path / "run", keep_last=2)
    for iteration in (10, 20, 30, 100):
        keeper.save(state_at(iteration), is_best=iteration == 10)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == [
        "iter_00000100.pt",
        "iter_00000030.pt",
    ]
    assert checkpoint.read(keeper.best)["progress"]["iteration"] == 10
    assert not list((tmp_path / "run").glob(".*"))


def test_best_is_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    keeper.save(state_at(1), is_best=True)
    keeper.save(state_at(2))
    assert checkpoint.read(keeper.best)["progress"]["iteration"] == 1


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    good = keeper.save(state_at(1), is_best=True)
    before = good.read_bytes()
    large = state_at(2, size=800)  # 2.5 MB and as much again for each moment
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1 << 20, hard)
    )  # what a full disk does: the write fails half-way
    try:
        with pytest.raises(CheckpointError, match=r"iter_00000002\.pt: .*File too large"):
            keeper.save(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", good.name]
    assert good.read_bytes() == before
    assert checkpoint.find(tmp_path, "auto")[0] == good
    assert keeper.save(large).is_file()  # with space again it works


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"could not write .*file.*iter_00000001\.pt"):
        CheckpointKeeper(tmp_path / "file" / "run").save(state_at(1))


def test_auto_resumes_from_the_newest_readable_one(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None  # nothing there: a run starts afresh
    keeper = CheckpointKeeper(tmp_path, keep_last=3)
    for iteration in (1, 2, 3):
        newest = keeper.save(state_at(iteration))
    newest.write_bytes(newest.read_bytes()[:1000])  # as an interrupted copy from elsewhere leaves it
    for place, resume in ((tmp_path, "auto"), (tmp_path / "elsewhere", str(tmp_path))):
        path, state, unreadable = checkpoint.find(place, resume)
        assert (path.name, state["progress"]["iteration"]) == ("iter_00000002.pt", 2)
        assert list(unreadable) == [newest] and "iter_00000003.pt is damaged" in unreadable[newest]
    with pytest.raises(CheckpointError, match=r"resume: .*elsewhere holds no iter"):
        (tmp_path / "elsewhere").mkdir()
        checkpoint.find(tmp_path, str(tmp_path / "elsewhere"))
    assert checkpoint.find(tmp_path, "never") is None
    assert checkpoint.find(tmp_path, str(tmp_path / "iter_00000001.pt")).state["progress"]["iteration"] == 1
    for path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint.*iter_00000003.*iter_00000001"):
        checkpoint.find(tmp_path, "auto")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "damaged or not a checkpoint"),
        (b"some text, quite long" * 100, "damaged or not a checkpoint"),
        ({"weight": torch.ones(2)}, "was not written by"),
        ({"model": {}, "format": 99}, "layout 99"),
        ({"model": {}, "format": "one"}, "was not written by"),
        ({"model": {}, "format": 1, "config": None}, "lacks its configuration"),
        ({"model": {}, "format": 1, "code": os.system}, "not a checkpoint"),  # never runs code from a file
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(path)
    assert "x.pt" in str(error.value)


def test_flipped_bytes_are_found(tmp_path):
    """In a tensor they would be other weights; every checksum is looked at."""
    path = checkpoint.write_atomically(tmp_path / "a.pt", state_at(1, size=100))
    assert checkpoint.read(path)
    part = flip_bytes(path)
    words = rf"a\.pt is damaged .*the bytes of {part} are not those that were written"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
def test_why_a_file_is_no_checkpoint(tmp_path, kind):
    path = tmp_path / "iter_00000001.pt"
    write_something_else(path, kind)
    words = SOMETHING_ELSE[kind].replace("holds no weights", "not a checkpoint")
    words = "was not written by `afa train`" if kind in ("list", "no tensors") else words
    with pytest.raises(CheckpointError, match=r"iter_00000001\.pt .*" + words):
        checkpoint.read(path)


def test_what_is_newer_than_the_step_gone_back_to_costs_no_checkpoint(tmp_path):
    """A damaged one does not count, and what was just written is never the one to go."""
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    newest = keeper.save(state_at(30))
    newest.write_bytes(b"")
    keeper = CheckpointKeeper(tmp_path, keep_last=2, unreadable=[newest])
    for iteration in (10, 20):
        keeper.save(state_at(iteration))
    assert [path.name[-5:-3] for path in checkpoint.checkpoints(tmp_path)] == ["30", "20", "10"]
    keeper = CheckpointKeeper(tmp_path, keep_last=1)
    written = keeper.save(state_at(15))
    assert written.is_file()
