"""Operators from many Python threads, from forked data loader workers, and under ThreadSanitizer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import sanitized
from support.common import DEVICE, ROOT, available
from support.cuda_emulator import build
from support.every_operator import Everything, everything

import afa_kernels

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


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA cannot be used in a forked process")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """The parent's thread pool has run before the fork, which must not leave the workers waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = [everything(seed) for seed in range(6)]
    finally:
        torch.set_num_threads(threads)
    # No time limit of its own: how long a worker takes to import PyTorch is the machine's affair.
    loader = torch.utils.data.DataLoader(
        Everything(),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    for got, alone in zip(loader, want, strict=True):
        assert_same(got, alone)


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


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA cannot be used in a forked process")
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    """As joblib and multiprocessing.Pool fork it, in the middle of a script."""
    torch.set_num_threads(2)
    image, probs = (255 * torch.rand(1, 3, 60, 80)).to(torch.uint8), torch.rand(1, 3, 60, 80).softmax(1)
    want = afa_kernels.dense_crf(image, probs, 2)
    child = os.fork()
    if child == 0:
        same = torch.equal(afa_kernels.dense_crf(image, probs, 2), want) and torch.get_num_threads() == 1
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    assert ended[1] == 0 and torch.get_num_threads() == 2
