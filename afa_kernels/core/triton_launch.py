"""What the Triton backends have around their launches: the device of their tensors made current, small tables on it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_TABLES = 512


def interpreted() -> bool:
    """Under Triton's interpreter every operation costs a call, so the blocks are made large."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its first tensor's device current, which is where Triton launches whatever it is given."""

    @functools.wraps(function)
    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _current(tensor.device):
            return function(tensor, *args, **kwargs)

    return run


class _Tables:
    """Tables by their values and device, each copied there once.

    A CUDA graph keeps the address of what it was captured with, so a table that a capture has seen stays; one that
    a capture needs first is written by the device, for the host's copy could not be waited for.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, Tensor] = {}
        self._captured: set[tuple] = set()
        self._lock = threading.RLock()

    def get(self, values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = values, dtype, device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            table = self._kept.get(key)
            if table is not None and capturing:
                self._captured.add(key)
            if table is None and not capturing:
                self._make_room(device)
                table = self._kept[key] = self._copy(values, dtype, device)
        if table is None:
            table = torch.empty(len(values), dtype=dtype, device=device)
            for index, value in enumerate(values):
                table[index].fill_(value)
        return table

    def _copy(self, values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        table = torch.tensor(values, dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read it
        return table

    def _make_room(self, device: torch.device) -> None:
        loose = [key for key in self._kept if key[2] == device and key not in self._captured]
        if len(loose) >= MOST_TABLES:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels may still read them
            for key in loose:
                del self._kept[key]


table = _Tables().get
