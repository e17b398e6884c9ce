"""``python -m afa_kernels.compat``: a training script as it is, with the kernels underneath."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.clients import client
from support.common import ROOT

from afa_kernels.compat.__main__ import main

TRAIN = """
import sys
import numpy as np
import torch
import pydensecrf.densecrf as dcrf
from bilateralfilter import bilateralfilter_batch
from par import PAR as Refine
from par import PAMR

class PAR(PAMR):
    def forward(self, x, mask):
        return super().forward(x, mask) + 1

image, mask = torch.rand(2, 3, 12, 16), torch.rand(2, 2, 12, 16)
refine = Refine(num_iter=2, dilations=[1, 2])
for _ in range(int(sys.argv[1])):
    refine(image, mask)
PAR(2, [1, 2])(image, mask)
crf = dcrf.DenseCRF2D(16, 12, 2)
crf.setUnaryEnergy(np.zeros((2, 192), np.float32))
crf.addPairwiseGaussian(sxy=3, compat=3)
crf.inference(2)
out = np.zeros(2 * 2 * 192, np.float32)
bilateralfilter_batch(image.numpy().ravel(), mask.numpy().ravel(), out, 2, 2, 12, 16, 15.0, 50.0)
print("ends as", __name__, "with", sys.argv, out.any())
raise SystemExit(3)
"""


WORKERS = """
import multiprocessing
import sys
import pydensecrf.densecrf
import torch
from par import PAR

def work(number):
    PAR(num_iter=2, dilations=[1])(torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9))
    return PAR.forward.afa_served.calls, pydensecrf.densecrf.__name__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map_async(work, [1]).get(60))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A repository with a script that imports what lies beside it."""
    folder = tmp_path_factory.mktemp("their repository")
    (folder / "par.py").write_text(client())
    (folder / "train.py").write_text(TRAIN)
    (folder / "workers.py").write_text(WORKERS)
    return folder


def run(folder, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "afa_kernels.compat", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has it from 3.11 on")
def test_a_path_that_is_to_stay_as_it_is_does(folder):
    (folder / "path.py").write_text("import sys; print(sys.path[0])")
    done = run(folder, "path.py", PYTHONSAFEPATH="1")
    assert done.returncode == 0 and done.stdout.strip() == str(ROOT), done.stdout + done.stderr


@pytest.mark.parametrize("how", [("train.py",), ("-m", "train")], ids=" ".join)
def test_a_script_runs_as_it_is_and_what_was_served_is_told(folder, how):
    done = run(folder, *how, "5")
    assert done.returncode == 3, done.stderr
    assert "ends as __main__ with ['" in done.stdout and "'5'] True" in done.stdout
    assert "par.PAR: 5 calls by the kernels in " in done.stderr and "by its own forward about " in done.stderr
    assert "par.PAMR: 1 calls by the kernels" in done.stderr
    assert "__main__.PAR: 0 calls by the kernels" in done.stderr
    assert "1 calls by its own forward: it differs from PAMR" in done.stderr
    assert "pydensecrf's inference: 1 calls in " in done.stderr and "bilateralfilter_batch: 1 calls in " in done.stderr
    assert "Traceback" not in done.stderr
    assert "afa_kernels.compat: " not in done.stdout  # what a script prints may be read by a program


@pytest.mark.parametrize("method", ["spawn"])
def test_processes_that_it_starts_are_served_too(folder, method):
    done = run(folder, "workers.py", method)
    assert done.returncode == 0, done.stderr
    assert "[(1, 'afa_kernels.compat.pydensecrf.densecrf')]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"), [((), "usage: "), (("missing.py",), "no such file: missing.py"), (("-m",), "usage: ")]
)
def test_what_is_wrong_with_the_line_is_said(arguments, said):
    with pytest.raises(SystemExit, match=said):
        main(arguments)


def test_help_is_the_modules_own(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "its arguments" in capsys.readouterr().out


def test_an_error_of_the_script_is_the_scripts(folder):
    (folder / "broken.py").write_text("import par\nraise RuntimeError('theirs')\n")
    done = run(folder, "broken.py")
    assert done.returncode == 1 and "RuntimeError: theirs" in done.stderr
    assert "nothing of it was called" in done.stderr or "par.PAR: 0 calls" in done.stderr
