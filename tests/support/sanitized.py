"""Runs a script in a process of its own with a sanitizer's runtime preloaded; skips where the compiler has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cuda_emulator import build


def run(name: str, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``name``: asan or tsan. What tsan finds makes the exit status 66."""
    runtime = subprocess.run(
        [build.compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"the compiler has no lib{name}")
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    fixed = []
    if name == "tsan":
        options = {"LD_PRELOAD": runtime, "TSAN_OPTIONS": "exitcode=66 report_signal_unsafe=0"}
        # Address randomisation can leave no room where the sanitizer wants its own memory.
        if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
            fixed = ["setarch", "-R"]
    command = [*fixed, sys.executable, str(script), *arguments]
    return subprocess.run(command, env={**os.environ, **options, **environment}, capture_output=True, text=True)
