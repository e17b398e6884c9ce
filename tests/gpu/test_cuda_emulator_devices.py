"""Devices as users have them, emulated: code of another architecture, a part of a device, no code at all, several host
threads.
"""

from __future__ import annotations

import threading

import pytest
import torch
from support.common import relative_error
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated

from afa_kernels import diffuse, par, random_walk
from afa_kernels.core import backends, native_module

pytestmark = ON_THE_EMULATOR
GPU = torch.device("cuda", 0)


@pytest.fixture
def operators(rng):
    """Each operator that plans a cooperative launch, on inputs of its own."""
    images, masks = torch.rand(1, 3, 20, 33, generator=rng), torch.rand(1, 4, 20, 33, generator=rng)
    weights, affinity = torch.rand(1, 9, 20, 33, generator=rng) / 9, torch.rand(1, 49, 20, 33, generator=rng)
    taps = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    return {
        "par": lambda backend=None: par(images, masks, (1, 4), 3, backend=backend),
        "diffuse": lambda backend=None: diffuse(weights, masks, taps, 3, backend=backend),
        "random_walk": lambda backend=None: random_walk(affinity, masks, 3, num_steps=3, backend=backend),
    }


def cooperative(launches: list[str]) -> bool:
    return any(launch.startswith("cooperative") for launch in launches)


# --- a part of a device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["par", "diffuse", "random_walk"])
def test_a_refused_cooperative_launch_is_streamed(emulator, operators, name):
    """Another process has the rest of the device: more blocks than there is room for are turned away (error 720)."""
    run, want = operators[name], operators[name]("reference")
    with emulated(emulator):
        emulator.set_device()
        emulator.launches()
        run()
        assert cooperative(emulator.launches()), "this size is resident where there is room"
        emulator.set_device(room=1)
        for _ in range(2):  # the second call plans for it
            assert relative_error(run(), want) < 1e-5
            assert not cooperative(emulator.launches())
        emulator.set_device()
        run()
        assert cooperative(emulator.launches())


def test_the_plan_of_par_can_be_asked_for(emulator, operators, monkeypatch):
    with emulated(emulator):
        for plan in ("resident", "streaming"):
            monkeypatch.setenv("AFA_PLAN", plan)
            emulator.launches()
            assert relative_error(operators["par"](), operators["par"]("reference")) < 1e-5
            assert cooperative(emulator.launches()) == (plan == "resident")
        monkeypatch.setenv("AFA_PLAN", "resident")
        emulator.set_device(1, 1000)
        with pytest.raises(RuntimeError, match="not supported"):
            operators["par"]()
        masks = torch.rand(1, 2, 9, 9, requires_grad=True)
        emulator.set_device()
        par(torch.rand(1, 3, 9, 9), masks, (1,), 2).sum().backward()  # the adjoint has one plan


# --- several host threads ---------------------------------------------------------------------------------------------


def test_two_host_threads_with_different_plans_of_one_kernel(emulator):
    """The GIL is released: what one launch lets its kernel have must be enough for another thread's larger one."""
    sizes, failures, plans = [(64, 64), (64, 128)], [], []
    taps = [(tap % 5, tap // 5) for tap in range(20)]  # too few for registers: both are the same kernel

    def work(weights: torch.Tensor, masks: torch.Tensor) -> None:
        try:
            for _ in range(15):
                diffuse(weights, masks, taps, 2, backend="native")
        except RuntimeError as error:
            failures.append(str(error))
        plans.append(cooperative(emulator.launches()))

    with emulated(emulator):
        emulator.set_device(4, 227 * 1024, pause=5000)
        threads = [
            threading.Thread(target=work, args=(torch.rand(1, 20, *size), torch.rand(1, 1, *size))) for size in sizes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [] and plans == [True, True]


# --- what the driver and the binary say -------------------------------------------------------------------------------


@pytest.fixture
def gpu(emulator, monkeypatch):
    """As if there were a GPU, whose driver is the emulator; nothing is launched."""
    monkeypatch.setattr(native_module, "native", emulator.native)
    monkeypatch.setattr(native_module, "_probed", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    yield emulator
    emulator.set_device()


def test_a_device_without_code_for_it_falls_to_triton_and_says_why(gpu, monkeypatch):
    assert native_module.native_can_run("par", GPU) is None
    gpu.set_device(compiled=0)
    assert native_module.native_can_run("par", GPU) is None, "asked once for each device"
    monkeypatch.setattr(native_module, "_probed", {})
    monkeypatch.setattr(native_module, "build_info", lambda: {"cuda_archs": "80-real;90"})
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        native_module.native_can_run("par", GPU)
    for device in (GPU, torch.device("cuda")):
        reason = native_module.native_can_run("par", device)
        assert "no kernel image" in reason and "80-real;90" in reason and "AFA_CUDA_ARCHS=75" in reason
    row = next(row for row in backends.backends() if row[:3] == ("par", "native", "cuda"))
    assert not row.available and row.reason == reason
    monkeypatch.setitem(backends._registry["par"], "triton", lambda device, *tensors: None)
    monkeypatch.setenv("AFA_SELF_CHECK", "0")
    tensor = type("OnGpu", (), {"device": GPU, "dtype": torch.float32, "requires_grad": False})()
    assert backends.choose("par", None, tensor) == "triton"
    with pytest.raises(ValueError, match="no kernel image"):
        backends.choose("par", "native", tensor)


def test_a_driver_older_than_the_compiler_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu.native, "cuda_probe", lambda index: (35, "CUDA driver version is insufficient"))
    monkeypatch.setattr(gpu.native, "cuda_versions", lambda: (12040, 13000))
    with pytest.warns(RuntimeWarning, match="cannot run on device 0: CUDA driver version"):
        native_module.native_can_run("par", GPU)
    reason = native_module.native_can_run("par", GPU)
    assert "CUDA 13.0" in reason and "12.4" in reason and "update the driver" in reason


def test_what_is_over_at_the_next_call_is_asked_again(gpu, monkeypatch):
    answers = [(2, "out of memory"), (0, "")]
    monkeypatch.setattr(gpu.native, "cuda_probe", lambda index: answers.pop(0))
    assert native_module.native_can_run("par", GPU) == "out of memory"
    assert native_module.native_can_run("par", GPU) is None
    assert native_module.native_can_run("par", GPU) is None and answers == []


def test_a_module_older_than_the_python_files_is_no_crash(gpu, monkeypatch):
    monkeypatch.delattr(gpu.native, "cuda_probe")
    assert "pip install -e ." in native_module.native_can_run("par", GPU)


@pytest.mark.parametrize("name", ["par", "diffuse", "random_walk"])
def test_a_plan_that_changes_after_its_memory_was_asked_for(emulator, operators, name, monkeypatch):
    """Another thread's cooperative launch was refused in between: the streamed plan needs more than there is."""
    want = operators[name]("reference")
    with emulated(emulator):
        original, changes = native_module.workspace, []

        def allocate(size, device):
            scratch = original(size, device)
            if not changes:
                changes.append(size)
                emulator.set_device(1, 1000)  # from here on everything is streamed
            return scratch

        monkeypatch.setattr(native_module, "workspace", allocate)
        assert relative_error(operators[name](), want) < 1e-5
    assert changes
