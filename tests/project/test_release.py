"""A release: what it says of itself, what the source distribution holds, and (slow) that it and the wheel install into
empty environments and run there.
"""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from support import empty_environment
from support.common import ROOT
from support.requirements import project, settings
from support.source_tree import SOURCES, TOP, package_files, sdist

import afa_kernels

LICENSE = (ROOT / "LICENSE").read_text().split()[0]  # MIT License ...
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PYTHONS = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory) -> Path:
    return sdist(tmp_path_factory.mktemp("sources"))


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]|rc)?\d*", afa_kernels.__version__)
    assert "version" in project["dynamic"] and "version" not in project
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.M)
    heading = re.search(r"^## ([\d.]+)(?:, | \()", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading[1] == afa_kernels.__version__, "of the newest entry"


def test_the_citation_is_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == LICENSE
    paper = cited["preferred-citation"]
    assert paper["year"] == 2022 and [each["family-names"] for each in paper["authors"]] == ["Ru", "Zhan", "Yu", "Du"]
    assert "Learning Affinity from Attention" in paper["title"]


def test_every_python_is_tested_and_has_a_wheel():
    assert PYTHONS == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    suite, installed = WORKFLOWS["tests"]["jobs"]["suite"], WORKFLOWS["wheels"]["jobs"]["installed"]
    assert suite["strategy"]["matrix"]["python"] == installed["strategy"]["matrix"]["python"] == PYTHONS
    built = settings["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]


@pytest.mark.parametrize("package", ["afa_kernels", "afa_model"])
def test_the_oldest_python_reads_every_file(package):
    for path in (ROOT / package).rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_workflows_run_what_is_here():
    """Files and targets of make that they name are there, and no job runs without a limit."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = {line.split(":")[0] for line in lines if re.match(r"[a-z-]+:", line)}
    assert set(WORKFLOWS) == {"docs", "tests", "wheels"}
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 360
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            assert set(re.findall(r"\bmake ([\w-]+)", commands)) <= targets
            for name in re.findall(r"(?<![\w/])(?:tests|benchmarks|\.ci)/[\w./]+", commands):
                assert (ROOT / name).exists(), name


def test_reports_of_problems_ask_for_what_the_commands_print():
    forms = {path.stem: path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    for name in ("problem", "speed", "wish"):
        form = yaml.safe_load(forms[name])
        assert {"name", "description", "body"} <= set(form)
        assert all({"id", "type", "attributes"} <= set(field) for field in form["body"])
    assert "afa doctor --check" in forms["problem"] and "python -m afa_kernels.bench" in forms["speed"]


# --- the source distribution ------------------------------------------------------------------------------------------


def test_a_source_distribution_holds_all_that_it_is_built_from(source_distribution):
    with tarfile.open(source_distribution) as files:
        held = {name.partition("/")[2] for name in files.getnames() if files.getmember(name).isfile()}
    wanted = {path.relative_to(ROOT).as_posix() for path in SOURCES} | set(TOP) | package_files()
    made = {name for name in held if name.startswith("afa.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert held - made == wanted


def test_a_source_distribution_says_what_it_needs(source_distribution):
    with tarfile.open(source_distribution) as files:
        (name,) = (name for name in files.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        told = email.message_from_binary_file(files.extractfile(name))
    assert source_distribution.name == f"afa-{afa_kernels.__version__}.tar.gz"
    assert told["Version"] == afa_kernels.__version__ and told["Requires-Python"] == project["requires-python"]
    assert told["License"] == LICENSE and told["License-File"] == "LICENSE"
    assert told["Description-Content-Type"] == "text/markdown"
    needed = told.get_all("Requires-Dist")
    assert [each for each in needed if "extra ==" not in each] == project["dependencies"]
    assert {"train", "coco", "export", "real", "serve", "all"} <= set(told.get_all("Provides-Extra"))
    assert any(re.fullmatch(r"timm>=1.0; extra == .train.", each) for each in needed)


# --- installed into empty environments --------------------------------------------------------------------------------


SHORT = ["--schedule.max_iters", "4", "--schedule.warmup_iters", "1", "--step.cam_iters", "1", "--step.aff_iters", "2"]
SHORT += ["--loader.batch_size", "2", "--augment.crop", "64", "--eval.limit", "8"]
ALONE = """
import importlib.util, afa_kernels
info = afa_kernels.build_info()
others = [name for name in ("timm", "torchvision", "numpy") if importlib.util.find_spec(name)]
print(info["native"], info["cuda_reason"], others)
"""


def run(folder: Path, *command: str | Path, code: int = 0) -> str:
    """What a command prints in an empty folder, without a way to this checkout; of one that fails, why."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "AFA_BACKEND")}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def wheel(source_distribution, tmp_path_factory) -> Path:
    """Built as `pip install` builds it: of the source distribution, in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", str(folder)]
    environment = {**os.environ, "AFA_CUDA": "0"}
    done = subprocess.run([*command, str(source_distribution)], env=environment, capture_output=True, text=True)
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no package index to build from")
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_is_small(wheel):
    """That with the CUDA kernels is measured where it is built (.github/workflows/wheels.yml)."""
    assert wheel.stat().st_size < 10e6


@pytest.mark.slow
def test_the_operators_run_where_only_torch_is(wheel, tmp_path):
    python = empty_environment.make(tmp_path / "environment")
    installed = empty_environment.pip(python, "install", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert empty_environment.pip(python, "check").returncode == 0
    assert run(tmp_path, python, "-c", ALONE) == "True AFA_CUDA=0 was set when this was built []\n"
    block = run(tmp_path, python, "-m", "afa_kernels.bench", "pcm", "--seconds", "0", "--device", "cpu")
    assert f"- afa {afa_kernels.__version__}, on " in block and "| pcm | N=784" in block
    afa = python.with_name("afa")
    assert f"afa {afa_kernels.__version__}" in run(tmp_path, afa, "--version")
    assert "compiled" in run(tmp_path, afa, "doctor")
    assert "pip install 'afa[train]'" in run(tmp_path, afa, "demo", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "source distribution"])
def test_the_quick_demo_runs_where_only_what_it_needs_is(kind, wheel, source_distribution, tmp_path, monkeypatch):
    python = empty_environment.make(tmp_path / "environment", "train")
    monkeypatch.setenv("AFA_CUDA", "0")
    chosen = ["--no-index", str(wheel)] if kind == "wheel" else ["--no-deps", str(source_distribution)]
    installed = empty_environment.pip(python, "install", *chosen)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert empty_environment.pip(python, "check").returncode == 0
    printed = run(tmp_path, python.with_name("afa"), "demo", "--out", "run", "--data.root", "data", *SHORT)
    assert re.search(r"random walk \+ PAR\s+\d", printed)
    assert (tmp_path / "run").is_dir() and any((tmp_path / "run" / "panels").iterdir())
