"""Backends as tests name them: those that run here, and the CUDA sources run thread by thread on the CPU.

    "native", "triton", "reference"      as `afa_kernels.use_backend` takes them; None leaves the choice to the operator
    "emulated contracted streaming"      products fused into sums, on a device so small that nothing stays on chip

A test takes such names as its ``backend``, a fixture of conftest.py, and hands on what that gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import afa_kernels
from support.common import DEVICE
from support.cuda_emulator import build
from support.cuda_emulator.operators import emulated

# A device on which PAR's weights stay on chip, and one so small that everything is streamed: multiprocessors, bytes of
# shared memory.
CHIPS = {"resident": (4, 227 * 1024), "streaming": (1, 1000)}
_KINDS = build.kinds() if DEVICE == "cpu" and build.compiler() is not None else []

EMULATED = [f"emulated {kind}" for kind in _KINDS]  # as if there were one device, for operators that have one plan
EMULATED_CHIPS = [f"{name} {chip}" for name in EMULATED for chip in CHIPS]
ONE_EMULATED = EMULATED_CHIPS[:1]  # for what does not depend on it


@contextmanager
def running(name: str | None) -> Iterator[str | None]:
    """Within the block calls without a backend run there; gives the name that calls take as theirs."""
    if name is None or not name.startswith("emulated "):
        with afa_kernels.use_backend(name):
            yield name
        return
    kind, *chip = name.split()[1:]
    with emulated(build.load(kind)) as emulator:
        if chip:
            emulator.set_device(*CHIPS[chip[0]])
        yield "native"
