"""Classes that are made after `patch`: in modules imported later, in the script itself, in functions."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .in_place import NAMES

_watchers: list[Callable[[type], None]] = []


def _made(cls: type, **keywords) -> None:
    super(nn.Module, cls).__init_subclass__(**keywords)
    if cls.__name__ in NAMES:
        for watcher in _watchers:
            watcher(cls)


def start(watcher: Callable[[type], None]) -> None:
    """Call it with every torch module class of one of the names as it is made."""
    if not _watchers:
        nn.Module.__init_subclass__ = classmethod(_made)
    _watchers.append(watcher)


def stop(watcher: Callable[[type], None]) -> None:
    """No more."""
    if watcher in _watchers:
        _watchers.remove(watcher)
        if not _watchers:
            del nn.Module.__init_subclass__
