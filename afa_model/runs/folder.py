"""The folder of a run: one run at a time has it, and a run that is refused leaves it as it was."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

from ..config import Config, to_yaml
from ..errors import ConfigError, reason
from . import checkpoint

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

LOCK = "run.lock"


class InUse(ConfigError):
    """Another run is at work in the folder."""


class RunFolder:
    """Locks a run's folder from its making to :meth:`release`; all processes but the first only look into it.

    The lock is the system's on a file that names host and process: it ends with the process, however that ends, and
    where the file system can it holds for other hosts too.

    Attributes:
        notes: what was found, for the log.

    Raises:
        InUse: another run is at work in the folder.
        ConfigError: it holds a run that was not asked for, or cannot be written.
    """

    def __init__(self, config: Config, first: bool = True):
        self.config, self.path = config, Path(config.out)
        self.notes: list[str] = []
        self._handle: int | None = None
        self._made = False
        there = checkpoint.checkpoints(self.path)
        if there and config.resume == "never":
            raise ConfigError(
                f"out: {self.path} holds a run already ({there[0].name}): --resume auto goes on with it;"
                " or choose another folder"
            )
        if first:
            try:
                self._made = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
            except OSError as error:
                raise ConfigError(f"out: {self.path} cannot be written: {reason(error)}") from error

    def _lock(self) -> None:
        """Take the lock file; one whose process is gone is taken over, and that is noted."""
        path = self.path / LOCK
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            before = _owner(os.pread(handle, 4096, 0).decode(errors="replace"))
            free = self._try(handle, before)
            if free and _same_file(handle, path):  # the one before may have taken it away in between
                break
            os.close(handle)
            if not free:
                raise InUse(
                    f"out: {self.path} is in use by process {before.get('process', '?')} on"
                    f" {before.get('host', 'another host')} ({path}): wait for it, or choose another folder"
                )
        self._handle = handle
        if before:
            self.notes.append(
                f"process {before['process']} on {before['host']}, which had this folder, is gone: taken over"
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)

    def _try(self, handle: int, before: dict[str, Any]) -> bool:
        """Whether this process has the lock now."""
        if fcntl is not None:
            try:
                # Of the process, not of the open file: children that load data and outlive it for seconds have no part.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
        # A file system without locks: what the file says has to do.
        own = before and before["host"] == socket.gethostname() and before["process"] != os.getpid()
        return not (own and _alive(before["process"]))

    def accept(self, writes: bool) -> None:
        """The run begins: its settings are written down (``writes``), in place of those of the one it goes on with."""
        if not writes:
            return
        target = self.path / "config.yaml"
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(to_yaml(self.config))
            os.replace(temporary, target)
        except OSError as error:
            raise ConfigError(f"out: {self.path} cannot be written: {reason(error)}") from error

    def release(self) -> None:
        """Give the lock back; a folder that was made for nothing goes."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
        os.close(self._handle)
        self._handle = None
        if self._made:
            with contextlib.suppress(OSError):  # there is something in it
                self.path.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()


def _owner(text: str) -> dict[str, Any]:
    """Host and process in a lock file; nothing where it was not written to its end."""
    try:
        content = json.loads(text)
        return {"host": str(content["host"]), "process": int(content["process"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
