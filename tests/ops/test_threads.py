"""Operators from many Python threads, from forked data loader workers, and under ThreadSanitizer."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import sanitized
from support.common import DEVICE, ROOT, available
from support.cuda_emulator import build
from support.every_operator import Everything, everything

from afa_kernels.core import native_module

NATIVE = "native" in available("par")
pytestmark = pytest.mark.skipif(not NATIVE, reason="no native backend here")


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_eight_python_threads_at_once():
    want = [everything(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, alone in zip(pool.map(everything, range(8)), want):
                assert_same(got, alone)


def after_all_threads() -> list[list[torch.Tensor]]:
    """Every operator's results, by as many threads as there are; what other processes then must find again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return [everything(seed) for seed in range(3)]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what is loaded is read from /proc")
def test_torch_and_the_kernels_have_one_openmp():
    """Another one would be a second pool, whose threads spin beside torch's."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len({path for path in loaded if os.path.basename(path).startswith(("libgomp", "libiomp", "libomp"))}) == 1


def test_an_openmp_that_only_torch_sees_is_shared(monkeypatch):
    """Where the loader does not find its functions the runtime that torch has loaded is opened for all."""
    tried, opened = [], []

    def load(name: str) -> object:
        tried.append(name)
        if len(tried) == 1:
            raise ImportError("_native.so: undefined symbol: GOMP_parallel")
        return native_module.native

    monkeypatch.setattr(native_module.importlib, "import_module", load)
    monkeypatch.setattr(native_module.ctypes, "CDLL", lambda path, mode: opened.append((path, mode)))
    assert native_module._load() == (native_module.native, None)
    ((path, mode),) = opened
    assert len(tried) == 2 and mode == native_module.ctypes.RTLD_GLOBAL
    assert "omp" in os.path.basename(path) and os.path.exists(path)


@pytest.mark.parametrize("message", ["_native.so: undefined symbol: GOMP_parallel", "libstdc++.so.6: cannot open"])
def test_what_cannot_be_loaded_is_tried_no_further(message, monkeypatch):
    def load(name: str) -> object:
        if name.endswith("_native"):
            raise ImportError(message)
        return importlib.import_module(name)

    def no_library(path: str, mode: int) -> None:
        raise OSError(path)

    monkeypatch.setattr(native_module, "importlib", SimpleNamespace(import_module=load))
    monkeypatch.setattr(native_module.ctypes, "CDLL", no_library)
    native, reason = native_module._load()
    assert native is None and message in reason


def arrays(seed: int) -> list:
    """What processes hand back: arrays, for tensors go through memory that both must open."""
    return [value.numpy() for value in everything(seed)]


def same_arrays(got: list, want: list[list[torch.Tensor]]) -> None:
    for values, alone in zip(got, want, strict=True):
        assert_same([torch.from_numpy(value) for value in values], alone)


on_the_host = pytest.mark.skipif(DEVICE != "cpu", reason="CUDA cannot be used in a forked process")


@on_the_host
def test_data_loader_workers():
    """The parent's thread pool has run before the fork, which must not leave the workers waiting for it."""
    want = after_all_threads()
    # No time limit of its own: how long a worker takes to import PyTorch is the machine's affair.
    loader = torch.utils.data.DataLoader(Everything(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for got, alone in zip(loader, want, strict=True):
        assert_same(got, alone)


@on_the_host
@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_pools_of_multiprocessing(start):
    want = after_all_threads()
    with multiprocessing.get_context(start).Pool(2 if start == "fork" else 1) as pool:
        same_arrays(pool.map_async(arrays, range(3)).get(300), want)


@on_the_host
@pytest.mark.parametrize("backend", ["multiprocessing", "loky", "threading"])
def test_joblib(backend):
    joblib = pytest.importorskip("joblib")
    want = after_all_threads()
    with joblib.parallel_config(backend, n_jobs=2):
        same_arrays(joblib.Parallel(timeout=300)(joblib.delayed(arrays)(seed) for seed in range(3)), want)


@on_the_host
def test_a_fork_within_a_fork_and_a_fork_while_kernels_run():
    """A worker that forks again, and one that is forked by one thread in the midst of another's kernels."""
    want = after_all_threads()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            everything(0)

    other = threading.Thread(target=busy)
    other.start()
    try:
        for _ in range(3):
            assert forked(lambda: forked(lambda: assert_same(everything(1), want[1])) == 0 or 1 / 0) == 0
    finally:
        stop.set()
        other.join()
    assert_same(everything(2), want[2])


def watched(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = ROOT / "tests" / "support" / "thread_sanitizer" / "threaded_operators.py"
    return sanitized.run("tsan", script, str(library), *arguments, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's kernels are what is watched")
def test_native_code_under_thread_sanitizer():
    library = build.build("thread")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "GOMP" not in symbols, "openmp.cpp lacks an entry that the kernels call"
    run = watched(library)
    assert run.returncode == 0 and "every operator ran" in run.stdout, run.stderr[-4000:]
    race = watched(library, "race")
    assert race.returncode == 66 and "data race" in race.stderr and "afa_planted_race" in race.stderr


def forked(call) -> int:
    """The exit status of a fork that calls it; 0 where it ends without an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    return ended[1]


@on_the_host
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    """As joblib and multiprocessing.Pool fork it, in the middle of a script."""
    want = after_all_threads()
    threads = torch.get_num_threads()

    def child() -> None:
        assert torch.get_num_threads() == 1
        assert_same(everything(0), want[0])

    assert forked(child) == 0 and torch.get_num_threads() == threads
