"""Within `bounds_checked`, Triton's interpreter looks at every address it reads or writes: one outside the tensors that
the kernel was given fails, whether or not something else lies there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first element and behind its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class CheckedMemory:
    """Stands for the compiled module through which the interpreter reaches memory."""

    def __init__(self, real) -> None:
        self.real, self.accesses = real, 0
        self.begins = self.ends = np.zeros(0, np.uint64)

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def allow(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted(map(span, tensors))
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        # Views of one storage overlap; what any earlier one reaches is allowed.
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        used = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask.astype(bool)]
        self.accesses += used.size
        place = np.searchsorted(self.begins, used, side="right") - 1
        outside = (place < 0) | (used + np.uint64(size) > self.ends[np.maximum(place, 0)])
        if outside.any():
            raise IndexError(f"{int(outside.sum())} of {used.size} addresses are outside the kernel's tensors")

    def load(self, addresses, mask, other, dtype):
        self.check(addresses, mask, np.dtype(dtype).itemsize)
        return self.real.load(addresses, mask, other, dtype)

    def store(self, addresses, values, mask):
        self.check(addresses, mask, values.dtype.itemsize)
        return self.real.store(addresses, values, mask)


@contextmanager
def bounds_checked() -> Iterator[CheckedMemory]:
    memory = CheckedMemory(interpreter._interpreter)
    launch = interpreter.GridExecutor.__call__

    def checked_launch(self, *args, **kwargs):
        memory.allow([arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)])
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter.GridExecutor, "__call__", checked_launch),
    ):
        yield memory
