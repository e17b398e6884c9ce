"""The processes and the device of a run: one process needs nothing, ``torchrun`` starts several."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError


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
def processes(device: str) -> Iterator[Here]:
    """Join the process group that ``torchrun`` announces in the environment; alone without it."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Here(*place(), chosen)
    finally:
        if joins:
            dist.destroy_process_group()


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
        moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
    return moved


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 autocast as ``amp`` says: ``auto`` (on a GPU that computes in bfloat16), ``bf16``, ``off``."""
    if amp == "auto":
        enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        enabled = amp == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def data_parallel(step: nn.Module, here: Here) -> nn.Module:
    """Average the gradients of ``step`` over the processes; a lone process gets ``step`` itself.

    The training step gives every parameter a gradient in every phase, so unused ones need not be looked for.
    """
    if here.world_size == 1:
        return step
    ids = [here.device.index] if here.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(step, device_ids=ids)
