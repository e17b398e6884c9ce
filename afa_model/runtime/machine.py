"""The processors that this process may use, and how OpenMP's threads wait for each other: said before torch is loaded.

At the end of each parallel region threads wait at a barrier, and spin there for a while. Beside another busy process a
spinning thread takes the time slice of the one it waits for, and steps become several times slower; on an idle machine
a thread that sleeps at once costs a tenth of a step. ``benchmarks/bench_train_step.py --waiting`` measures both.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Turns of the waiting loop before a thread sleeps; libgomp has 300,000. On 2 cores (mit_b0, crop 160; seconds of a step
# alone, beside one busy thread, beside another step): 200 turns 0.50, 0.83, 0.87; 2,000 turns 0.46, 0.88, 0.97;
# 10,000 turns 0.53, 1.63, 1.78; 300,000 turns 0.46, 1.49, 1.91. A fair share is 1.5 and 2 times the time alone.
SPINS = "2000"


def share_the_machine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how OpenMP waits and how many threads it starts, unless the user did; before libgomp is loaded (by torch)."""
    if "OMP_WAIT_POLICY" not in environment and "GOMP_SPINCOUNT" not in environment:
        environment["GOMP_SPINCOUNT"] = SPINS
    quota = cpu_quota()
    if "OMP_NUM_THREADS" not in environment and quota is not None and quota < allowed_cpus():
        environment["OMP_NUM_THREADS"] = str(usable_cpus())  # OpenMP knows of the affinity mask, not of the quota


def threads_beside(workers: int, environment: MutableMapping[str, str] = os.environ) -> int | None:
    """Threads for a training step on the CPU beside processes that load its images; None where the user chose.

    Reading and cropping an image takes a tenth of what a step takes for it on a core, so four workers keep less than
    one core busy. Processes of one machine that train together share it.
    """
    if "OMP_NUM_THREADS" in environment:
        return None
    return max(1, (usable_cpus() - workers // 4) // int(environment.get("LOCAL_WORLD_SIZE", 1)))


def waiting() -> str:
    """How OpenMP's threads wait here, as the environment says."""
    said = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    return ", ".join(said) or "not set: threads that wait spin"


def usable_cpus() -> int:
    """Processors that this process may keep busy, by its affinity mask and its cgroup's quota; at least 1."""
    quota = cpu_quota()
    return allowed_cpus() if quota is None else max(1, min(allowed_cpus(), math.ceil(quota)))


def allowed_cpus() -> int:
    """Processors in the affinity mask (``taskset``, SLURM, cpusets)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = CGROUPS) -> float | None:
    """Processors' worth of time that the cgroup allows (``docker --cpus``, Kubernetes' limits), or None."""
    for read in (_quota_v2, _quota_v1):
        try:
            quota = read(root)
        except (OSError, ValueError):
            continue
        if quota is not None:
            return quota
    return None


def _quota_v2(root: Path) -> float | None:
    """The smallest of those of this process's cgroup and all above it."""
    (own,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")] or ["0::/"]
    folder, quotas = root / own[3:].strip("/"), []
    for place in (folder, *folder.parents):
        if (place / "cpu.max").is_file():
            limit, period = (place / "cpu.max").read_text().split()
            quotas += [] if limit == "max" else [int(limit) / int(period)]
        if place == root:
            break
    return min(quotas, default=None)


def _quota_v1(root: Path) -> float | None:
    limit, period = (int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return limit / period if limit > 0 else None
