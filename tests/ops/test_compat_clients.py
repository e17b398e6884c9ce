"""A folder of other repositories in small, run as they are and with ours underneath: what comes out is the same."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.client_folder import STYLES, write
from support.clients import KINDS
from support.common import ROOT, available, relative_error

from afa_kernels.compat.crf import crf_inference, crf_inference_label

pytestmark = pytest.mark.skipif("native" not in available("par"), reason="no native backend here")

PATCHED = "import afa_kernels.compat as c; c.patch({}); import runpy; runpy.run_path('train.py', run_name='__main__')"
# How the script is started, and whether pydensecrf and bilateralfilter are ours then.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
WAYS = {
    "script": (["-m", "afa_kernels.compat", "train.py"], True),
    "module under torchrun": ([*TORCHRUN, "-m", "afa_kernels.compat", "-m", "train"], True),
    "patch": (["-c", PATCHED.format("")], False),
}


def start(folder, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "trained, as __main__" in done.stdout, done.stderr
    return done


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """The folder, and what it gives by itself."""
    folder = write(tmp_path_factory.mktemp("repositories"))
    start(folder, "train.py", "theirs.pt")
    return folder, torch.load(folder / "theirs.pt", weights_only=False)


def same(got: object, want: object) -> None:
    for mine, their in zip(*((out if isinstance(out, tuple) else (out,)) for out in (got, want)), strict=True):
        assert mine.shape == their.shape and mine.dtype == their.dtype
        assert relative_error(mine, their) < (1e-4 if mine.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_and_style_gives_what_it_gave(clients, way):
    folder, theirs = clients
    arguments, packages = WAYS[way]
    done = start(folder, *arguments, "ours.pt", *(["crf"] if packages else []))
    ours = torch.load(folder / "ours.pt", weights_only=False)
    refined = ours.pop("crf", None)
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        assert list(ours[name]) == list(want)
        for call, value in want.items():
            same(ours[name][call], value)
    if packages:
        check_served(done.stderr)
        assert len(refined) == 5 and "pydensecrf's inference: 3 calls" in done.stderr


def calls(line: str) -> int:
    return int(line.split(": ")[2].split()[0])


def check_served(said: str) -> None:
    """Those that can be are served, the others are named with the reason."""
    lines = {line.split(": ")[1]: line for line in said.splitlines() if " calls by the kernels" in line}
    # Of seven calls each, one by autocast, which few do as we do.
    of_it = [name for name, text in STYLES.items() if "copies.PAR" in text and "PAMR" not in text and name != "late"]
    assert len(of_it) == 14 and calls(lines["copies.PAR.PAR"]) == 7 * len(of_it)
    for number, (kind, (_, built, served)) in enumerate(KINDS.items()):
        line = lines[f"copies.kind{number}.{built.partition('(')[0]}"]
        resized = 3  # which is where what is aligned otherwise differs
        assert calls(line) == (7 if served else 7 - resized if kind == "aligned otherwise" else 0), line
        assert served or "calls by its own forward: " in line
    for name in ("PAR_late.PAR", "from_source.PAR", "environment.PAR"):
        assert f"copies.{name}" in lines, name


def test_what_the_packages_give_is_what_the_functions_give(clients):
    folder, _ = clients
    image = np.random.default_rng(0).integers(0, 256, (20, 28, 3)).astype(np.uint8)
    probs = np.random.default_rng(1).random((4, 20, 28)).astype(np.float32)
    probs /= probs.sum(0)
    code = f"import numpy as np, torch, sys; sys.path.insert(0, {str(folder)!r})\n"
    code += "from afa_kernels import compat; compat.patch([], pydensecrf=True, rloss=True, verbose=False)\n"
    code += "import copies.crf; torch.save(copies.crf.run(*np.load('in.npz').values()), 'crf.pt')\n"
    np.savez(folder / "in.npz", image=image, probs=probs)
    start(folder, "-c", code + "print('trained, as __main__')")
    refined, labels, general, several, one = torch.load(folder / "crf.pt", weights_only=False)
    assert np.abs(refined - crf_inference(image, probs, 3, labels=4)).max() < 1e-5
    assert (labels == crf_inference_label(image, probs.argmax(0), 3, 4)).all()
    assert np.abs(general.sum(0) - 1).max() < 1e-5 and np.array_equal(several, one) and several.min() > 0
