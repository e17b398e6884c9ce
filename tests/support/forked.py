"""Processes of a test without what starting one costs: forked, with all the modules that the test has imported.

One thread each, for OpenMP's threads do not survive a fork. What must start as a user starts it is no case for these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def processes(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """``function(rank, *arguments)`` in so many processes; raises if one of them does."""
    mp.start_processes(_alone, (function, *arguments), nprocs=count, start_method="fork")


def _one_thread() -> None:
    """Also where a run chooses the number itself."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _alone(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    _one_thread()
    function(rank, *arguments)


def run(function: Callable[[], int | None]) -> subprocess.CompletedProcess:
    """``function()`` in a process whose exit status it returns; and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = os.fork()
        if child == 0:
            _become(function, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return subprocess.CompletedProcess([], status, out.read_text(), err.read_text())


def _become(function: Callable[[], int | None], out: Path, err: Path) -> None:
    status = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        _one_thread()
        status = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
