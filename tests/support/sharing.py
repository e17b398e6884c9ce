"""Imported before torch: each of pytest's processes has one core, and none spins on that of another."""

import os

from afa_model.runtime.machine import share_the_machine

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
share_the_machine()
