"""The build: what kernels may include, one list of sources, installing without a compiler, failing with a bad one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import afa_kernels

SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def test_kernels_know_nothing_of_torch():
    assert SOURCES
    for path in SOURCES:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_every_source_is_in_the_one_list():
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {str(path.relative_to(ROOT)) for path in SOURCES if path.suffix in (".cpp", ".cu")}


def test_per_instruction_set_copies_share_no_function(tmp_path):
    """Of an inline function emitted twice the linker keeps one: perhaps the AVX-512 one, for every machine."""
    nm, cxx = shutil.which("nm"), shutil.which("g++")
    if not nm or not cxx:
        pytest.skip("needs g++ and nm")
    kernels = re.search(r"set\(AFA_CPU_KERNELS([^)]*)\)", (ROOT / "CMakeLists.txt").read_text()).group(1).split()
    for source in kernels:
        out = tmp_path / "kernel.o"
        flags = [
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-mavx2",
            "-mfma",
            "-DAFA_ISA=avx2",
            "-DAFA_WITH_X86_ISAS=1",
            "-Wno-psabi",
        ]
        subprocess.run([cxx, *flags, "-c", str(ROOT / source), "-o", str(out)], check=True)
        symbols = subprocess.run([nm, "-C", str(out)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line) and "afa::avx2::" not in line]
        assert not shared, f"{source}: {shared}"


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("afa_kernels", "afa_model"):
        ignored = shutil.ignore_patterns("_native*.so", "_build_info.py", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_compiler_it_installs_and_says_what_is_missing(tmp_path):
    built = _build(tmp_path, CXX="no-such-compiler")
    assert built.returncode == 0, built.stderr
    program = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["afa_kernels._native"] = None  # whatever else is installed here
import torch, afa_kernels
assert afa_kernels.__file__.startswith(sys.argv[1])
images, masks = torch.rand(1, 3, 8, 9), torch.rand(1, 2, 8, 9)
print(afa_kernels.par(images, masks).shape)
print(afa_kernels.build_info()["native_reason"])
try:
    afa_kernels.par(images, masks, backend="native")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    shape, reason, refused = run.stdout.splitlines()
    assert shape == "torch.Size([1, 2, 8, 9])"
    assert "no C++ compiler" in reason and reason in refused


def test_a_compiler_that_fails_stops_the_installation(tmp_path):
    pytest.importorskip("pybind11", reason="the build environment's pybind11 is not installed here")
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "tree").mkdir()
    assert _build(tmp_path / "tree", CXX=str(broken), AFA_CUDA="0").returncode != 0


def test_build_info_says_why_something_is_missing():
    info = afa_kernels.build_info()
    assert info["native"] or info["native_reason"]
    assert info["cuda"] or info["cuda_reason"]


def test_build_requirements_ask_for_the_cuda_compiler_only_where_it_is_needed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import build_backend

    monkeypatch.setattr(build_backend, "system_nvcc", lambda: None)
    monkeypatch.setattr(build_backend.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build_backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build_backend.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setenv("AFA_CUDA", "1")
    assert set(build_backend.CUDA_WHEELS) <= set(build_backend._with_cuda([]))
    assert len({name.split("==")[1] for name in build_backend.CUDA_WHEELS}) == 1  # one line of versions
    monkeypatch.setenv("AFA_CUDA", "0")
    assert build_backend._with_cuda(["ninja"]) == ["ninja"]
    monkeypatch.setenv("AFA_CUDA", "1")
    monkeypatch.setattr(build_backend.shutil, "which", lambda name: None)
    assert build_backend._with_cuda([]) == []  # no C++ compiler: nvcc could not use its wheels either
    monkeypatch.setattr(build_backend.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(build_backend, "system_nvcc", lambda: "/usr/bin/nvcc")
    assert build_backend._with_cuda([]) == []
