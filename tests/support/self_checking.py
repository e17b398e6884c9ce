"""What the tests of the self check share: a process that knows nothing, kernels that are wrong.

On a GPU a backend proves itself before its first use. Here the native backend of the CPU is made to. The fixtures'
functions have names of their own, so that test files can import them.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

from afa_kernels import random_walk
from afa_kernels.core import self_check
from afa_kernels.ops.random_walk import native as random_walk_native

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(name="nothing_is_known")
def nothing_is_known_fixture(monkeypatch):
    monkeypatch.setattr(self_check, "_proven", set())
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.delenv("AFA_SELF_CHECK", raising=False)
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(name="checks")
def checks_fixture(monkeypatch):
    """The CPU's native backend has to prove itself; the checks that were made gather in the list."""
    made, compare = [], self_check._compare

    def counted(found, *key):
        made.append(key)
        compare(found, *key)

    monkeypatch.setattr(self_check, "concerns", lambda backend, device: True)
    monkeypatch.setattr(self_check, "_compare", counted)
    return made


def walk_inputs(dtype: torch.dtype = FLOAT, gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    affinity, cams = (torch.rand(1, count, 5, 6, generator=generator).to(dtype) for count in (9, 2))
    return affinity.requires_grad_(gradients), cams.requires_grad_(gradients)


def walk(backend: str | None = None, **kind) -> torch.Tensor:
    return random_walk(*walk_inputs(**kind), 1, backend=backend)


def explode(*_):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


WRONG = {
    "one percent": (lambda out: out * 1.01, r"float32 forward differs from the reference by 0\.01 \(allowed 0\.0001\)"),
    "NaN": (lambda out: out * torch.nan, "float32 forward is not finite"),
    "one NaN": (lambda out: out.index_put((torch.tensor(0),) * 4, torch.tensor(torch.nan)), "forward is not finite"),
    "exception": (explode, "RuntimeError: no kernel image is available for execution on the device"),
}


@pytest.fixture(params=WRONG, name="broken")
def broken_fixture(request, monkeypatch, checks):
    """Why the random walk's kernel, which is wrong from here on, is refused."""
    change, reason = WRONG[request.param]
    break_kernel(monkeypatch, random_walk_native, "random_walk", change)
    return f"self check failed: .*{reason}"


def break_kernel(monkeypatch, module, name, change):
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(kernel(*args)))


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
