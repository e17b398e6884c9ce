"""The public operators on the emulated CUDA kernels: within `emulated`, CPU tensors take the path of CUDA tensors."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import afa_kernels
from afa_kernels import ops
from afa_kernels.core import native_module

from .build import Emulator


@contextmanager
def emulated(emulator: Emulator, order: int = 0) -> Iterator[Emulator]:
    """Within the block the native backend runs the CUDA sources, emulated, threads and blocks in this order."""
    original = native_module.native
    # An operator imports its calls when it is first called: within the block it would keep the emulator for good.
    for operator in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(f"{operator.name}.native")
    emulator.set_order(order)
    with mock.patch.multiple(native_module, on_cuda=lambda tensor: True, cuda_stream=lambda device: (0, 0)):
        patches = [
            mock.patch.object(module, "native", emulator.native)
            for name, module in list(sys.modules.items())
            if name.startswith(afa_kernels.__name__ + ".") and getattr(module, "native", None) is original
        ]
        for patch in patches:
            patch.start()
        try:
            with afa_kernels.use_backend("native"):
                yield emulator
        finally:
            for patch in reversed(patches):
                patch.stop()
            emulator.set_order(0)
            emulator.set_device()
            emulator.set_blocks()
            emulator.set_dry(False)
