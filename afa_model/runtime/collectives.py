"""Sums and means over the processes that train together; in a process on its own they change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AfaError
from .processes import place


def process_count() -> int:
    """How many processes train together: 1 outside a process group."""
    return place()[1]


def gather_from_all(value: Any) -> list[Any]:
    """``value`` of every process, by rank. Every process must call this."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of ``values``, any shape and dtype, over all processes; no gradient. All must call this."""
    values = values.detach().clone()
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def same_as_first(tensors: Iterable[Tensor]) -> None:
    """Give each of ``tensors`` the values that it has in process 0, in place. Every process must call this."""
    if process_count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def shown_as_mean(*values: Tensor) -> tuple[Tensor, ...]:
    """Scalars that have the mean over all processes as their value and this process's gradient."""
    if process_count() == 1:
        return values
    mean = sum_over_processes(torch.stack([value.detach().float() for value in values])) / process_count()
    return tuple(value + (of_all - value.detach()) for value, of_all in zip(values, mean))


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """What one process fails at inside, all do, with the error of one that did: none is left waiting for it.

    Every process must come here, and inside none may wait for another.
    """
    own = None
    try:
        yield
    except AfaError as error:
        own = error
    errors = [error for error in gather_from_all(own) if error is not None]
    if errors:
        raise own or errors[0]


class Ballot:
    """The largest of the numbers that all processes give, once a step. Every process must call :meth:`cast`.

    On a GPU it is that of the call before, so that no step waits for the host; a process on its own knows at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._open: tuple[Tensor, torch.cuda.Event] | None = None

    def cast(self, number: int) -> int:
        """This process's number -> the largest of all."""
        if process_count() == 1:
            return number
        largest = torch.full((1,), number, dtype=torch.int32, device=self._device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if self._device.type == "cpu":
            return int(largest)
        before = self._open
        host = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(largest, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._open = host, copied
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


class Notice:
    """Something that one process has to tell the others, who look for it when they like; nobody waits."""

    def __init__(self, name: str):
        self._name = name
        store = dist.distributed_c10d._get_default_store() if process_count() > 1 else None
        self._store, self._given = store, False

    def give(self) -> None:
        """Tell it, once. Without the store (the launcher is gone) nobody hears."""
        if self._store is not None and not self._given:
            self._given = True
            with contextlib.suppress(RuntimeError):
                self._store.set(self._name, "given")

    def seen(self) -> bool:
        """Whether some process told it."""
        if self._given or self._store is None:
            return self._given
        with contextlib.suppress(RuntimeError):
            return self._store.check([self._name])
        return False
