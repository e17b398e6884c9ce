"""Where the tests run and what all of them ask: device, repository, backends, errors.

Scripts that run in processes of their own import it too, with ``tests`` on their path.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

# Where the operator tests put their tensors. With "cuda" the same tests prove the CUDA and the compiled Triton
# backends.
DEVICE = os.environ.get("AFA_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    import support.fast_interpreter  # noqa: F401


def available(operator: str) -> list[str]:
    """The backends that can run an operator on DEVICE, the reference first."""
    import afa_kernels

    rows = [row for row in afa_kernels.backends() if row.operator == operator and row.device == DEVICE]
    return sorted((row.backend for row in rows if row.available), key=["reference", "native", "triton"].index)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in float64."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def cut_off(backend: str | None) -> float:
    """How much more a sum of positive numbers may err where tensor cores add it up: they cut off, and do not round.

    Triton's exact filter goes through them on a GPU, compiled: 6.6e-6 was seen on an H200. Elsewhere it is 1.
    """
    return 10.0 if backend == "triton" and DEVICE == "cuda" else 1.0
