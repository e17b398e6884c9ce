"""The order in which a run sees its training images: a function of the iteration count alone."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ..conventions import require
from ..errors import AfaError, TrainingError, naming, reason
from ..runtime.signals import end_with_parent, held_back
from .datasets import EvaluationSet, TrainingSet


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
) -> CarefulLoader:
    """An endless loader of training batches from ``start_iteration`` on, the same whatever the number of
    workers.

    It never touches the global random state, so the order in which a run is built or resumed does not matter.
    """
    sampler = ResumableBatchSampler(len(dataset), batch_size, seed, rank, world_size, start_iteration)
    workers = dataset.settings.num_workers if num_workers is None else num_workers
    return CarefulLoader(
        _Told(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=end_with_parent,
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(dataset: EvaluationSet, share: Sequence[int], num_workers: int = 0) -> DataLoader:
    """A loader of one image after the other, those of ``share``. It never touches the global random state."""
    return CarefulLoader(
        _Told(dataset),
        batch_size=None,
        sampler=share,
        num_workers=num_workers,
        collate_fn=_handed_over,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )


class CarefulLoader(DataLoader):
    """A loader whose processes no signal reaches, and whose errors are told as if they had happened here.

    Raises, while batches are taken:
        DataError: an image cannot be loaded (any more).
        TrainingError: a process that loads data ended, or there is no shared memory for its batches.
    """

    def __iter__(self) -> Batches:
        with held_back():
            batches = super().__iter__()
        return Batches(batches)


class Batches:
    """What such a loader gives, one after the other."""

    def __init__(self, batches: Iterator[Any]):
        self._batches = batches
        # Held by the finalizer too: as a part of garbage that is a cycle, as with a traceback, its queues would close
        # before it could tell the processes through them to end.
        self._end = weakref.finalize(self, _end_processes, batches)
        self._end.atexit = False  # but by _close_all, before multiprocessing waits
        _open.add(self)

    def close(self) -> None:
        """End the processes that load them."""
        self._batches = iter(())
        self._end()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        with death_told():
            batch = next(self._batches)
        if isinstance(batch, AfaError):
            raise batch
        return batch


@contextlib.contextmanager
def death_told() -> Iterator[None]:
    """That a process that loads data ended is told in one line. torch raises it wherever the main process happens to
    be, so whoever uses a loader's batches does so inside.

    Raises:
        TrainingError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or isinstance(error, AfaError):
            raise
        raise TrainingError(
            f"a process that loads data ended: {reason(error)}; the system may have killed it for want of memory or of"
            " shared memory (/dev/shm): num_workers 0 (of data, of eval) loads without such processes"
        ) from error


def _end_processes(batches: Iterator[Any]) -> None:
    getattr(batches, "_shutdown_workers", lambda: None)()
    for process in getattr(batches, "_workers", ()):
        if process.is_alive():  # it did not answer, and SIGTERM does not reach it
            process.kill()


_open: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At the interpreter's end multiprocessing sends SIGTERM, which these processes do not get, and waits for ever."""
    for batches in list(_open):
        batches.close()


class _Told(Dataset):
    """The samples of a data set, and in place of one that cannot be had the error: raised in another process it would
    arrive as that process's traceback.
    """

    def __init__(self, dataset: TrainingSet | EvaluationSet):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any] | AfaError:
        try:
            with naming(self.dataset.names[item if isinstance(item, int) else item[0]], "image"):
                return self.dataset[item]
        except AfaError as error:
            return error


def _collate(samples: list[dict[str, Any] | AfaError]) -> dict[str, Any] | AfaError:
    error = next((sample for sample in samples if isinstance(sample, AfaError)), None)
    return error or _in_shared_memory(default_collate, samples)


def _handed_over(sample: dict[str, Any] | AfaError) -> dict[str, Any] | AfaError:
    """Into shared memory here and now: later, on the way to the process that waits for it, torch would find none for it
    on another thread, and say so to nobody.
    """
    if isinstance(sample, AfaError) or get_worker_info() is None:
        return sample
    return _in_shared_memory(_shared, sample)


def _shared(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value.share_memory_() if isinstance(value, Tensor) else value for key, value in sample.items()}


def _in_shared_memory(make: Callable[[Any], dict[str, Any]], samples: Any) -> dict[str, Any] | AfaError:
    try:
        return make(samples)
    except (RuntimeError, OSError) as error:
        if get_worker_info() is None:
            raise
        return TrainingError(
            f"what a process loaded cannot be handed over: {reason(error)}; where shared memory (/dev/shm) is short,"
            " num_workers 0 (of data, of eval) does without (in a container: --shm-size)"
        )
