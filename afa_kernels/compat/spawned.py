"""Processes that multiprocessing starts anew import the script again: what was patched must be there before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from multiprocessing import spawn
from unittest import mock

from . import patch


def everything(verbose: bool = False) -> None:
    """PAR, PAMR and both packages."""
    patch(pydensecrf=True, rloss=True, verbose=verbose)


class _First:
    """Among what such a process is told before all else: to patch is to read it."""

    def __reduce__(self):
        return everything, ()


@contextlib.contextmanager
def patched_too() -> Iterator[None]:
    """Within the block processes of the methods spawn and forkserver patch everything before they import anything."""
    told = spawn.get_preparation_data
    with mock.patch.object(spawn, "get_preparation_data", lambda name: {"afa_kernels": _First(), **told(name)}):
        yield
