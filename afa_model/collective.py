"""Sums and means over the processes that train together; in a process on its own they change nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """How many processes train together: 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
