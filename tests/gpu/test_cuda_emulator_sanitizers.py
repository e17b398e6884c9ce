"""The CUDA sources, run on the CPU under the sanitizers: addresses, undefined behaviour, data races."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import sanitized
from support.cuda_emulator import build
from support.cuda_emulator.marks import ON_THE_EMULATOR

pytestmark = ON_THE_EMULATOR

SCRIPT = Path(build.__file__).with_name("under_sanitizers.py")


def addresses_watched(*arguments: str) -> str:
    result = sanitized.run("asan", SCRIPT, "address", *arguments)
    return result.stdout + result.stderr


def test_every_kernel_under_address_and_undefined_behaviour_sanitizers():
    build.build("address")
    said = addresses_watched()
    assert "clean after" in said, said[-3000:]
    assert "AddressSanitizer: heap-buffer-overflow" in addresses_watched("global_overrun")
    assert "sound: unnoticed" in addresses_watched("sound")


def watched_for_races(*arguments: str) -> subprocess.CompletedProcess:
    """Each CUDA thread is a thread to ThreadSanitizer."""
    return sanitized.run("tsan", SCRIPT, "races", *arguments)


def test_no_kernel_has_a_data_race():
    """In shared and in global memory, within a block and across blocks, whatever the numbers come to."""
    run = watched_for_races()
    assert run.returncode == 0 and "clean after" in run.stdout, (run.stdout + run.stderr)[-6000:]


@pytest.mark.parametrize("name", ["missing_barrier", "missing_grid_barrier"])
def test_a_data_race_is_seen(name):
    run = watched_for_races(name)
    assert run.returncode == 66 and "data race" in run.stderr and "faults.cu" in run.stderr


@pytest.mark.parametrize("name", ["sound", "sound_grid"])
def test_what_barriers_order_is_no_race(name):
    assert watched_for_races(name).returncode == 0
