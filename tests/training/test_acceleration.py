"""What is compiled and captured by itself: where that is safe, and what happens where it turns out not to be."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from afa_model.runtime.notices import forget_notices
from afa_model.training import acceleration
from afa_model.training.acceleration import CompiledNetworks, GraphedFunction, compiles, graphs

pytest_plugins = ["support.pretend_cuda"]  # the fixture of that name

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.fixture
def can_compile(monkeypatch):
    monkeypatch.setattr(acceleration, "has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)


@pytest.fixture(autouse=True)
def said(capsys):
    forget_notices()
    yield lambda: capsys.readouterr().err
    forget_notices()


def test_networks_are_compiled_for_a_gpu_in_long_runs(can_compile, monkeypatch):
    assert compiles("auto", GPU, 1000)
    assert not compiles("auto", GPU, 999) and not compiles("auto", CPU, 20_000)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiles("auto", GPU, 1000), "nothing to compile Triton's launchers with"
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "my-cc" else None)
    monkeypatch.setenv("CC", "my-cc")
    assert compiles("auto", GPU, 1000)
    monkeypatch.setattr(acceleration, "has_triton", lambda: False)
    assert not compiles("auto", GPU, 1000)
    assert compiles(True, CPU, 1) and not compiles(False, GPU, 1000), "what is asked for is done"


def test_graphs_are_where_one_can_hold_the_labels():
    assert graphs("auto", GPU, "eval", "par") and graphs("auto", GPU, "eval", "none")
    assert not graphs("auto", CPU, "eval", "par")
    assert not graphs("auto", GPU, "train", "par") and not graphs("auto", GPU, "eval", "crf")
    assert graphs(True, CPU, "eval", "par") and not graphs(False, GPU, "eval", "par")


class Doubling(nn.Module):
    def forward_pyramid(self, x):
        return 2 * x


class Two(nn.Module):
    """Two networks where an AFA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Doubling(), nn.Linear(2, 2)


def failing(error: type[Exception]):
    def compile_(function, **options):
        def run(*inputs):
            run.calls += 1
            raise error("no such instruction\nand a long trace")

        run.calls = 0
        compile_.made.append(run)
        return run

    compile_.made = []
    return compile_


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch, said):
    broken = failing(TorchDynamoException)
    monkeypatch.setattr(torch, "compile", broken)
    networks = CompiledNetworks(model := Two(), falls_back=True)
    for _ in range(2):
        with networks.in_use():
            assert model.encoder.forward_pyramid(torch.ones(1)).item() == 2
    assert [run.calls for run in broken.made] == [1, 0], "tried once; the decoder was not called"
    told = said()
    assert told.count("afa: note:") == 1 and "torch.compile failed" in told and "(no such instruction)" in told
    with pytest.raises(TorchDynamoException), CompiledNetworks(model).in_use():
        model.encoder.forward_pyramid(torch.ones(1))
    assert not said(), "who asked for it is told by the error"


def test_errors_of_the_network_itself_are_not_swallowed(monkeypatch, said):
    monkeypatch.setattr(torch, "compile", failing(ValueError))
    networks = CompiledNetworks(model := Two(), falls_back=True)
    with pytest.raises(ValueError, match="no such instruction"), networks.in_use():
        model.encoder.forward_pyramid(torch.ones(1))
    assert not said()


def results(x):
    return x * 2, (x > 0).long(), None


def test_a_graph_that_gives_the_same_is_replayed(pretend_cuda, said):
    graphed = GraphedFunction(results, falls_back=True)
    for value in (3.0, -1.0):
        got = graphed(torch.full((2, 2), value))
        assert got[0].tolist() == [[2 * value] * 2] * 2 and got[1].tolist() == [[int(value > 0)] * 2] * 2
        assert got[2] is None
    assert len(pretend_cuda) == 2 and not said()


@pytest.mark.parametrize("wrong", ["numbers", "labels", "nan"])
def test_a_graph_that_gives_something_else_is_given_up(pretend_cuda, monkeypatch, said, wrong):
    """And what the function gives is what the step gets, from the first time on."""
    real = GraphedFunction._replay

    def off(self, which, inputs):
        got = real(self, which, inputs)
        number = {"numbers": 1.06, "labels": 1.0, "nan": float("nan")}[wrong]
        return got[0] * number, got[1] + (wrong == "labels"), None

    monkeypatch.setattr(GraphedFunction, "_replay", off)
    graphed = GraphedFunction(results, falls_back=True)
    for value in (3.0, -1.0):
        got = graphed(torch.full((2, 2), value))
        assert got[0].tolist() == [[2 * value] * 2] * 2 and got[1].tolist() == [[int(value > 0)] * 2] * 2
    assert len(pretend_cuda) == 1 and not graphed._graphs
    told = said()
    assert told.count("afa: note:") == 1 and "no CUDA graph for the pseudo-labels (its results differ)" in told


def test_a_graph_that_cannot_be_captured_is_given_up(pretend_cuda, monkeypatch, said):
    def refused(self, inputs, options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(GraphedFunction, "_capture", refused)
    graphed = GraphedFunction(results, falls_back=True)
    assert [graphed(torch.ones(1))[0].item() for _ in range(2)] == [2, 2]
    assert "(CUDA out of memory. Tried to allocate)" in said()
    with pytest.raises(torch.OutOfMemoryError):
        GraphedFunction(results)(torch.ones(1))
