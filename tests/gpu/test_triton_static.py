"""What Triton's compiler makes of every kernel, for GPUs that need not be there: it takes them, and they spill no
more than a few words.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.common import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

# Bytes of shared memory a block may have: GeForce of Ampere and Ada, which run the layouts of 8.0 (an A100 has 163 KB),
# H100, and GeForce of Blackwell.
SHARED = {"80": 99 << 10, "90": 227 << 10, "120": 99 << 10}
NO_MAXIMUM = ("_exact_sums", "_gaussian_axis", "_window")  # exponentials of distances: nothing is taken off them
FEW_WORDS = 32  # bytes; the assembler gives up a few to have twice the warps on a multiprocessor, which is its to weigh
# Triton multiplies half precision on tensor cores from 8.0 on only; on Turing the CUDA kernels are the ones to use.


def compiled(*arguments: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "AFA_BACKEND")}
    environment |= {"AFA_TEST_DEVICE": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "support.triton_static", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", ["80", "90", pytest.param("120", marks=pytest.mark.slow)])
def test_every_kernel_compiles_fits_and_stays_in_registers(capability):
    kernels = compiled(capability, *["--all"] * (capability == "90"))
    sources = "\n".join(path.read_text() for path in Path(ROOT, "afa_kernels", "ops").rglob("triton_*.py"))
    launched = set(re.findall(r"\b(_\w+)\[.*?\]\(", sources))
    assert launched and launched == {kernel["name"] for kernel in kernels}
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED[capability]] == []
    assert [kernel for kernel in kernels if kernel.get("stack", 0) > FEW_WORDS] == []
    # As in test_cuda_static: a maximum must be taken off what it is the maximum of, rounded alike.
    shares = [kernel for kernel in kernels if kernel["name"] not in NO_MAXIMUM]
    sources = {line for kernel in shares for line in kernel.get("before_exponentials", ())}
    assert not sources or {line.split()[0] for line in sources} == {"FADD"}, sources
