"""Checkpoints that are complete or not there, and let a killed run go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import CheckpointError, SavingError, reason
from ..runtime.tensor_files import read_tensors

FORMAT = 1
"""Layout of the file; a checkpoint with a newer one is refused with a clear message."""

BEST = "best.pt"
_LAST = "iter_*.pt"


@dataclass
class Progress:
    """Where a run stands.

    ``iteration`` steps are done: the next one is number ``iteration``, counted from 0, and that is also the
    position in the data order. ``best`` is the best mIoU (0..100) of the evaluations so far.
    """

    iteration: int = 0
    best: float = float("-inf")


def random_state() -> dict[str, Any]:
    """States of the python, numpy, torch CPU and (if it was used) torch CUDA generators of this process.

    Only tensors, numbers, strings and tuples, so that the file loads with ``weights_only=True``.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one is what we keep)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The reverse of :func:`random_state`. A CUDA state is dropped where there is no CUDA device."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def kept_random_state():
    """Whatever happens inside (an evaluation, a picture) leaves the random states of the run as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def write_atomically(path: str | os.PathLike, value: Any) -> Path:
    """``torch.save`` to a file beside ``path``, flush, rename: ``path`` is the whole value or untouched.

    Raises:
        CheckpointError: with the path and the system's reason (disk full, not writable).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(
            error, (OSError, RuntimeError)
        ):  # torch's zip writer turns a full disk into the latter
            raise
        raise SavingError(f"could not write {path}: {reason(error)}") from error
    _flush_folder(path.parent)
    return path


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the file system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of this project (never runs code from the file).

    Raises:
        CheckpointError: the file is not there, is damaged, or is something else.
    """
    return checked(path, read_tensors(path, device=device))


def checked(path: str | os.PathLike, state: Any) -> dict[str, Any]:
    """What a file holds, if that is a checkpoint of this project.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(state, dict) or not _holds(state, {"format": int, "model": dict}):
        raise CheckpointError(
            f"checkpoint {path} was not written by `afa train` (backbone weights go to model.pretrained)"
        )
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has layout {state['format']}, this version reads up to {FORMAT}: update afa"
        )
    if not _holds(state, {"config": dict, "class_names": (list, tuple), "progress": dict}):
        raise CheckpointError(f"checkpoint {path} lacks its configuration, class names or progress")
    return state


def _holds(state: dict[str, Any], parts: dict[str, Any]) -> bool:
    return all(isinstance(state.get(name), kind) for name, kind in parts.items())


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The numbered checkpoints of a run, newest first."""
    return sorted(Path(folder).glob(_LAST), key=lambda path: path.name, reverse=True)


class Found(NamedTuple):
    """A checkpoint to go on from, what it holds, and why newer ones are not it, by their paths."""

    path: Path
    state: dict[str, Any]
    unreadable: dict[Path, str]


def find(folder: str | os.PathLike, resume: str) -> Found | None:
    """The checkpoint to go on from; None to start afresh.

    ``resume`` is ``"never"``, ``"auto"`` (the newest readable one in ``folder``), a path, or a run's folder (the newest
    readable one in it).

    Raises:
        CheckpointError: the path given is not readable, or a folder holds no readable checkpoint (with ``"auto"`` it
            may hold none at all).
    """
    if resume == "never":
        return None
    if resume != "auto" and not Path(resume).is_dir():
        return Found(Path(resume), read(resume), {})
    folder = Path(folder if resume == "auto" else resume)
    problems: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            return Found(path, read(path), problems)
        except CheckpointError as error:
            problems[path] = str(error)
    if problems:
        raise CheckpointError("no checkpoint to resume from is readable:\n  " + "\n  ".join(problems.values()))
    if resume != "auto":
        raise CheckpointError(f"resume: {folder} holds no iter_*.pt")
    return None


class CheckpointKeeper:
    """Writes numbered checkpoints into ``folder``; keeps the newest ``keep_last`` of them, and the best.

    Those of ``unreadable`` are left alone and do not count.
    """

    def __init__(self, folder: str | os.PathLike, keep_last: int = 2, unreadable: Collection[Path] = ()):
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._unreadable = set(unreadable)
        for left in self.folder.glob(".*.pt.*.tmp"):  # by a run that was killed while it wrote
            with contextlib.suppress(OSError):
                left.unlink()

    @property
    def best(self) -> Path:
        """Where the checkpoint with the best evaluation lies."""
        return self.folder / BEST

    def save(self, state: dict[str, Any], is_best: bool = False) -> Path:
        """Write ``state`` as the checkpoint of its iteration; older ones go once it is safe on disk.

        Raises:
            CheckpointError: nothing was written, and nothing that was there before has changed.
        """
        path = self.folder / f"iter_{state['progress']['iteration']:08d}.pt"
        write_atomically(path, state)
        if is_best:
            self._copy(path, self.best)
        self._unreadable.discard(path)
        others = [old for old in checkpoints(self.folder) if old != path and old not in self._unreadable]
        for old in others[self.keep_last - 1 :]:  # a run that went back to an earlier step has newer ones of before
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def _copy(self, source: Path, target: Path) -> None:
        """A hard link costs no space and no time; a file system without them gets a copy."""
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise SavingError(f"could not write {target}: {reason(error)}") from error


def pack(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    random_states: list[dict[str, Any]],
    config: dict[str, Any],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """All a run needs to go on; ``random_states`` has one entry per process, ``config`` is plain data."""
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {"iteration": progress.iteration, "best": progress.best},
        "random": random_states,
        "config": config,
        "class_names": list(class_names),
        "folder": _here(),  # relative paths among the settings count from here
        "torch": str(torch.__version__),
    }


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def unpack(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's weights and optimizer state in place.

    The random states are set by the caller, at the last moment.

    Raises:
        CheckpointError: the checkpoint belongs to another model, naming what does not fit.
    """
    if "optimizer" not in state:
        raise CheckpointError(
            "the checkpoint holds a model without the state of its training (`afa convert` wrote it): it can be"
            " evaluated, not gone on with; model.pretrained takes its backbone"
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this configuration (other model.* or data.num_classes?): {error}"
        ) from error
    return Progress(**state["progress"])
