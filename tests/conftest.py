"""Fixtures every test file shares: recorded numbers, photographs, poisoned allocations."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import support.sharing  # noqa: F401
import torch
from support.common import DEVICE, ROOT

if DEVICE == "cuda":
    torch.backends.cudnn.allow_tf32 = False  # convolutions, or recorded numbers could not be met
else:
    # At the first backward PyTorch starts a thread for each device there is. Tests that trace as if there were a GPU
    # make it believe in one, and a process with such threads allows its forks no backward.
    torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value.startswith("emulated ") for value in values):
            item.add_marker("cuda_emulator")


@pytest.fixture
def backend(request) -> Iterator[str | None]:
    """``parametrize(..., indirect=["backend"])``: one of the names of `support.running`, which is at work meanwhile."""
    from support.running import running

    with running(request.param) as name:
        yield name


def _first_existing(*paths: Path | None) -> Path | None:
    return next((path for path in paths if path is not None and path.exists()), None)


def _from_env(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


@pytest.fixture(scope="session")
def golden():
    """``golden(name)`` gives the recorded arrays of the public implementation as a dict; skips where they are
    absent.
    """

    def load(name: str) -> dict[str, np.ndarray]:
        folders = (_from_env("AFA_GOLDEN"), ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden")
        path = _first_existing(*(folder / f"{name}.npz" for folder in folders if folder is not None))
        if path is None:
            pytest.skip(f"recorded numbers {name}.npz not found: set AFA_GOLDEN to their folder")
        with np.load(path) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """A folder of real photographs in VOC layout; skips where there is none."""
    root = _first_existing(_from_env("AFA_VOC"), ROOT.parent / "shared" / "data" / "voc32")
    if root is None:
        pytest.skip("no photographs: set AFA_VOC to a folder in VOC layout")
    return root


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fresh tensors hold NaN, so that an output element which is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def as_it_was(request):
    """What a test leaves behind in its process: the number of threads (with more than a worker has cores every barrier
    waits for a time slice), and code that torch.compile keeps by function, of other backends of the same test.
    """
    if "compile" in request.node.name and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20220614)
