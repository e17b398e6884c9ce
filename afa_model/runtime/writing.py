"""Whether results can be written, known before the work that makes them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def writable_folder(path: str | Path, name: str) -> Path:
    """The folder, made if need be; ``name`` is the setting's.

    Raises:
        ConfigError: it is a file, or cannot be made or written into.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{name}: expected a folder, but {path} is a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # what permissions promise a full or read-only disk may not keep
            pass
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be written into ({error.strerror})") from error
    return path


def writable_file(path: str | Path, name: str) -> Path:
    """The file, whose folder is made if need be; one that exists may be replaced.

    Raises:
        ConfigError: it is a folder, or cannot be written.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f"{name}: expected a file, but {path} is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{name}: {path} cannot be written")
    writable_folder(path.parent, name)
    return path


def refuse_to_mix(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """
    Raises:
        ConfigError: the files in ``out`` were made by other settings than those of now; ``what`` they are.
    """
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in changed)
        raise ConfigError(f"out: {out} holds {what} ({told}); choose another folder")


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file beside ``path``, of the same ending, to write into; it takes the place of ``path`` when the block is done:
    whoever looks finds the whole file or none. The folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem
    if len(os.fsencode(stem)) > 100:  # a name may have 255 bytes, and the rest is added to it
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]
    temporary = path.with_name(f".{stem}.{socket.gethostname()}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
