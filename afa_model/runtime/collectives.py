"""Sums and means over the processes that train together; in a process on its own they change nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def shown_as_mean(*values: Tensor) -> tuple[Tensor, ...]:
    """Scalars that have the mean over all processes as their value and this process's gradient."""
    if process_count() == 1:
        return values
    mean = sum_over_processes(torch.stack([value.detach().float() for value in values])) / process_count()
    return tuple(value + (of_all - value.detach()) for value, of_all in zip(values, mean))
