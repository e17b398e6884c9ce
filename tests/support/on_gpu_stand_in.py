"""A machine for benchmarks/on_gpu.sh without a GPU: what its stages call is written down, and does what a test says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.common import ROOT

PYTHON = r"""#!/usr/bin/env bash
# For $PYTHON: answers as a GPU's machine does; $STAND_IN/NAME is what stage NAME runs, if it is there.
all=$*
case "$all" in
  *--machine*) echo '{"device": "GPU of 80 GB", "torch": "2", "python": "3", "driver": "1"}'; exit ;;
  *on_gpu_report.py* | *device_tests.py*) name=report ;;
  *native_module*) name=built ;;
  *afa_kernels.self_check*) name=self_check ;;
  -c*) name=${all##* } ;;
  *" pip "*) name=build ;;
  *doctor*) name=doctor ;;
  *--junitxml=*) name=${all##*--junitxml=} name=${name%%.xml*} name=${name##*/} ;;
  *every_operator.py*) name=every_operator ;;
  *--compile*) name=par_compiled ;;
  *--cuda-graph*) name=train_step_graph ;;
  *train_step*) name=train_step ;;
  *bench_host*) name=host ;;
  *bench_affinity_batches*) name=batches ;;
  *path_affinity*) name=others ;;
  *) name=${!#} ;;
esac
echo "$name: $all" >>"$STAND_IN/calls"
if [ -e "$STAND_IN/$name" ]; then . "$STAND_IN/$name"; elif [ "$name" = report ]; then exec "$REAL" "$@"; fi
"""
CHECKER = r"""#!/usr/bin/env bash
echo "checker: $*" >>"$STAND_IN/calls"
case "$*" in *--fault*) echo "========= Invalid __global__ write of size 4 bytes"; exit 9 ;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


class Machine:
    """A checkout of its own with the script, this checkout's tests, and the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.root, self.stand_in, self.out = folder / "checkout", folder / "stand_in", folder / "out"
        shutil.copytree(ROOT / "benchmarks", self.root / "benchmarks", ignore=shutil.ignore_patterns("results", "out"))
        (self.root / "tests").symlink_to(ROOT / "tests")
        for name in ("csrc", "afa_kernels"):
            (self.root / name).mkdir()
        for name in ("CMakeLists.txt", "setup.py", "csrc/par.cu"):
            (self.root / name).touch()
        self.stand_in.mkdir()
        for name, text in (("python", PYTHON), ("compute-sanitizer", CHECKER)):
            (self.stand_in / name).write_text(text)
            (self.stand_in / name).chmod(0o755)

    def does(self, stage: str, commands: str) -> None:
        """Bash that the stage runs, with the arguments of its command."""
        (self.stand_in / stage).write_text(commands)

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        own = {"PYTHON": self.stand_in / "python", "STAND_IN": self.stand_in, "REAL": sys.executable}
        path = f"{self.stand_in}:{os.environ['PATH']}"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AFA_")}
        variables = {key: str(value) for key, value in (clean | own | {"PATH": path} | environment).items()}
        command = ["bash", str(self.root / "benchmarks" / "on_gpu.sh"), str(self.out), *options]
        return subprocess.run(command, capture_output=True, text=True, env=variables)

    def calls(self, stage: str) -> list[str]:
        """The command lines of a stage."""
        file = self.stand_in / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix(f"{stage}: ") for line in lines if line.startswith(f"{stage}: ")]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))

    def left(self, suffix: str) -> str:
        """The text of the one file with this end."""
        (path,) = self.out.glob(f"*{suffix}")
        return path.read_text()
