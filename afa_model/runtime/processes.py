"""The processes and the device of a run: one process needs nothing, ``torchrun`` starts several."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from ..conventions import require
from ..errors import AfaError, ConfigError, ProcessError, reason
from .meeting import agreed_name

PROCESS_TIMEOUT = 10.0  # minutes


@dataclass(frozen=True)
class Here:
    """This process among those that train together.

    Attributes:
        rank: its number, 0..world_size-1.
        world_size: how many there are.
        device: where its tensors live.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0


def check_device(name: str) -> str:
    """
    Raises:
        ValueError: a name that stands for no device, wherever one is.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r} (there is {_devices()})")
    return name


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> a device; with several processes ``cuda`` is each one's own GPU.

    Raises:
        ConfigError: there is no such device; those that are here are listed.
    """
    try:
        check_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but torch sees no CUDA device (`afa doctor` says why)")
    number = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ConfigError(f"device: cuda:{number} was asked for, but there is only {_devices()}")
    return torch.device("cuda", number)


def _devices() -> str:
    """What this machine has, as ``cpu, cuda:0``."""
    return ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])


def announced_rank() -> int:
    """This process's rank as ``torchrun`` says in the environment, which it does before there is a process group."""
    return int(os.environ.get("RANK", 0))


def place() -> tuple[int, int]:
    """This process's rank, and how many processes there are: (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def processes(device: str, timeout: float = PROCESS_TIMEOUT) -> Iterator[Here]:
    """Join the process group that ``torchrun`` announces in the environment; alone without it.

    Args:
        device: as :func:`choose_device` takes it.
        timeout: minutes that one process waits for another.

    Raises:
        ProcessError: another process ended, or did not come within the timeout.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    try:
        if joins:
            _join("nccl" if chosen.type == "cuda" else "gloo", timedelta(minutes=timeout))
        yield Here(*place(), chosen)
    except RuntimeError as error:
        if isinstance(error, AfaError) or not (joins and _of_another(error)):
            raise
        told = re.sub(r"^\[.*?\] *", "", reason(error))  # without the place in gloo's sources
        raise ProcessError(
            f"process {announced_rank()}: another process ended, or did not answer within {timeout:g} minutes"
            f" (process_timeout): {told}"
        ) from error
    finally:
        if joins and dist.is_initialized():
            dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """The processes meet under a name that only those have which were started together: in the store of ``torchrun``
    they would else find, after a restart, the addresses of those that are dead.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agreed_name(store, rank, world_size, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _of_another(error: RuntimeError) -> bool:
    """Whether torch tells of the end or the silence of another process; gloo does so in plain RuntimeErrors."""
    words = str(error).lower()
    told = ("timed out", "timeout", "closed by peer", "connection reset", "connection refused", "broken pipe")
    return isinstance(error, dist.DistError) or any(phrase in words for phrase in told)


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (CUDA's too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global one)
    torch.manual_seed(seed)


def to_device(batch: Mapping[str, Any], device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """The tensors of a batch on ``device`` (a pinned one is copied without waiting), the rest as it is.

    The image boxes stay on the CPU: the pseudo-labels slice by them, and would have to wait for the device.
    """
    moved = {
        key: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and key != "img_box"
        else value
        for key, value in batch.items()
    }
    if channels_last:
        moved["image"] = moved["image"].contiguous(memory_format=memory_format(channels_last))
    return moved


def memory_format(channels_last: bool) -> torch.memory_format:
    """How images and the weights of convolutions lie in memory."""
    return torch.channels_last if channels_last else torch.contiguous_format


@contextlib.contextmanager
def laid_out(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """The weights of convolutions in channels_last inside, if that is asked for.

    Afterwards they are in the memory in which they were: a CUDA graph that was captured with them reads them there.
    """
    before = []
    for parameter in model.parameters() if channels_last else ():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            before.append((parameter, parameter.data))
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def data_parallel(step: nn.Module, here: Here) -> nn.Module:
    """Average the gradients of ``step`` over the processes; a lone process gets ``step`` itself.

    The training step gives every parameter a gradient in every phase, so unused ones need not be looked for.
    """
    if here.world_size == 1:
        return step
    for parameter in step.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(_Laid(parameter.stride()))
    ids = [here.device.index] if here.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(step, device_ids=ids)


class _Laid:
    """A gradient with the strides of its parameter. Along a side of length 1 a stride means nothing, and that of a
    convolution may have another there (depthwise and 1 x 1 kernels); the buckets that are averaged compare them all.
    """

    def __init__(self, strides: tuple[int, ...]):
        self.strides = strides

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        pairs = zip(gradient.shape, gradient.stride(), self.strides)
        if gradient.stride() == self.strides or any(a != b for size, a, b in pairs if size > 1):
            return None
        return gradient.as_strided(gradient.shape, self.strides)


def share_of(shard: str | None) -> tuple[int, int]:
    """Which share of work that needs no process group, from 0, of how many: ``shard``, I/N, or else torchrun's rank.

    Raises:
        ValueError: no such share, or one beside torchrun's.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if shard is None:
        return rank, world_size
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    right = found is not None and 1 <= int(found[1]) <= int(found[2])
    require(right, "shard", "I/N with I in 1..N, such as 1/4", shard)
    require(world_size == 1, "shard", "null under torchrun, which shares the work out", shard)
    return int(found[1]) - 1, int(found[2])
