"""The order in which a run sees its training images: a function of the iteration count alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ..conventions import require
from ..errors import DataError
from .datasets import TrainingSet


@dataclass
class LoaderSettings:
    """How training images are grouped.

    Args:
        batch_size: images per step and process (the published run: 2 on each of 2 GPUs).
    """

    batch_size: int = 2

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


class ResumableBatchSampler(Sampler):
    """Endless batches of ``(index, sample_seed)`` whose order is a function of the iteration count alone.

    The data are shuffled anew in every epoch (the permutation comes from ``(seed, epoch)``) and the epochs
    follow each other without a gap, so no image is dropped and batches have one size. Position ``p`` of that
    endless line belongs to iteration ``p // (batch_size * world_size)``; each rank takes ``batch_size``
    neighbours, so that two ranks with one image each see what one rank with two images sees. The sample's
    seed comes from ``(seed, p)``.

    Args:
        size: number of images.
        batch_size: images per rank and iteration.
        seed: of the run.
        rank: this process's number, 0..world_size-1.
        world_size: number of processes that train together.
        start_iteration: how many iterations the run has done already.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
    ):
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..world_size-1 = {world_size - 1}, got {rank}")
        if start_iteration < 0:
            raise ValueError(f"start_iteration: expected at least 0, got {start_iteration}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.start_iteration = rank, world_size, start_iteration
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration = self.start_iteration
        while True:
            yield self.batch(iteration)
            iteration += 1

    def batch(self, iteration: int) -> list[tuple[int, int]]:
        """What this rank gets in an iteration, counted from 0."""
        first = (iteration * self.world_size + self.rank) * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def epoch(self, iteration: int) -> int:
        """How many times all images have been seen before an iteration."""
        return iteration * self.world_size * self.batch_size // self.size

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.size)
            self._epoch = epoch
        sample_seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0] >> 1)
        return int(self._order[place]), sample_seed


class NamingLoader(DataLoader):
    """A loader whose processes' errors about a file are as short as the main process's: the file and what is wrong."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except Exception as error:
            # torch puts the whole traceback of the other process into the message; its last line is the error.
            kind, _, what = str(error).strip().rpartition("\n")[2].partition("Error: ")
            if "in DataLoader worker process" in str(error) and kind.rpartition(".")[2] in ("Data", "Photograph"):
                raise DataError(what) from None
            raise


def training_loader(
    dataset: TrainingSet,
    batch_size: int,
    seed: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> NamingLoader:
    """An endless loader of training batches from ``start_iteration`` on, the same whatever the number of
    workers.

    It never touches the global random state, so the order in which a run is built or resumed does not matter.
    """
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed, rank, world_size, start_iteration)
    workers = dataset.settings.num_workers if num_workers is None else num_workers
    return NamingLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )
