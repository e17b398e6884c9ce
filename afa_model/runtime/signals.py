"""Signals of a run: which ask it to stop, and that the processes that only load data get none of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C; what scancel, timeout, systemd and docker stop send; what SLURM may send early; a closed terminal."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """This thread gets the signals above at the end of the block, and processes and threads that are started in it
    never get any. Another thread that runs already may still take one.

    A signal to a whole process group would end the processes that load data, and with them the step that should still
    be done. :func:`end_with_parent` is for them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # no such signals either
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def end_with_parent(worker: int = 0) -> None:
    """This process ends when the one that started it does, however that ends. For a data loader's ``worker_init_fn``.

    Elsewhere than on Linux nothing happens; torch's loader looks for its parent every five seconds.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)
