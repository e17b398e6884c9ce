"""Triton launches on the device of its tensors, and its tables go there once."""

from __future__ import annotations

import contextlib
import importlib.util
import types

import pytest
import torch
from support.common import DEVICE
from support.every_operator import smallest

import afa_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
if importlib.util.find_spec("triton") is not None:
    from afa_kernels.core import triton_launch


@pytest.fixture
def tables(monkeypatch):
    """Tables of this test alone, in every module that asks for one."""
    from afa_kernels.ops.diffusion import triton_impl as diffusion_triton
    from afa_kernels.ops.par import triton_impl as par_triton

    fresh = triton_launch._Tables()
    for module in (triton_launch, diffusion_triton, par_triton):
        monkeypatch.setattr(module, "table", fresh.get)
    return fresh


@pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter")
def test_every_launch_has_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: with tensors of another one it fails, or worse."""
    from triton.runtime import interpreter

    current, launches = [], []

    @contextlib.contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    launch = interpreter.GridExecutor.__call__

    def watched(self, *args, **kwargs):
        launches.append(current[-1:] == [torch.device("cpu")])
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(triton_launch, "_current", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    with afa_kernels.use_backend("triton"):
        smallest()
    assert len(launches) > 12 and all(launches)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's")
def test_tables_are_copied_to_the_device_once(rng, tables, monkeypatch):
    images, masks, affinity = (torch.rand(1, channels, 5, 6, generator=rng) for channels in (3, 2, 9))

    def everything() -> list[torch.Tensor]:
        with afa_kernels.use_backend("triton"):
            return [
                afa_kernels.par(images, masks, (1, 9), 2),
                afa_kernels.diffuse(images, masks, [(0, 1), (2, 0), (-9, 9)], 2),
                afa_kernels.random_walk(affinity, masks, 1),
            ]

    first = everything()
    monkeypatch.setattr(tables, "_copy", lambda *_: pytest.fail("a table was copied again"))
    assert all(torch.equal(got, want) for got, want in zip(everything(), first))


def test_tables_differ_by_values_and_type(tables):
    integers = tables.get((1, 2), torch.int32, torch.device("cpu"))
    floats = tables.get((1, 2), torch.float32, torch.device("cpu"))
    assert integers.tolist() == [1, 2] and integers.dtype == torch.int32 and floats.dtype == torch.float32
    assert tables.get((2, 1), torch.int32, torch.device("cpu")).tolist() == [2, 1]


@pytest.fixture
def gpu(monkeypatch):
    """A device of type cuda whose memory is the host's; ``capturing`` says whether a CUDA graph is being captured."""
    state = types.SimpleNamespace(capturing=False, waited=0)
    device = types.SimpleNamespace(type="cuda", index=0)
    for name in ("tensor", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            triton_launch.torch, name, lambda *args, make=make, device, **options: make(*args, **options)
        )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)

    def wait():
        state.waited += 1

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(synchronize=wait))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: wait())
    state.get = lambda tables, *values: tables.get(values, torch.int32, types_device)
    types_device = _Device(device)
    return state


class _Device:
    def __init__(self, inner):
        self.type, self.index = inner.type, inner.index


def test_a_capture_uses_what_its_warm_up_left_and_copies_nothing(gpu, tables, monkeypatch):
    warm = gpu.get(tables, 3, 4)
    assert gpu.waited == 1, "other streams will read it"
    gpu.capturing = True
    monkeypatch.setattr(tables, "_copy", lambda *_: pytest.fail("a copy from the host within a capture"))
    assert gpu.get(tables, 3, 4) is warm
    cold = gpu.get(tables, 5, 6, 7)
    assert cold.tolist() == [5, 6, 7] and gpu.waited == 1
    assert gpu.get(tables, 5, 6, 7) is not cold, "what a graph writes when it is replayed is not there yet"


def test_tables_make_room_but_for_those_of_a_graph(gpu, tables, monkeypatch):
    monkeypatch.setattr(triton_launch, "MOST_TABLES", 3)
    kept = gpu.get(tables, 0)
    gpu.capturing = True
    gpu.get(tables, 0)
    gpu.capturing = False
    for value in range(1, 9):
        gpu.get(tables, value)
    assert gpu.get(tables, 0) is kept
    assert len(tables._kept) <= 4
