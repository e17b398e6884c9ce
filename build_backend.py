"""Build backend: setuptools, plus the CUDA compiler wheels as a build requirement where the system has no nvcc.

``pip install`` asks `get_requires_for_build_*` before it builds in its isolated environment, so no CUDA toolkit
need be installed. Here, too, is what setup.py and the tests ask about compilers, architectures and sources.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the other hooks are setuptools' own)

ROOT = Path(__file__).resolve().parent

# One line of versions throughout: the compiler driver, its front end, the device code generator and the headers check
# one another. The first of CUDA 13, whatever the minor version of torch's: its code runs on every driver that CUDA 13
# runs on. There is none for CUDA 12: its wheel (nvidia-cuda-nvcc-cu12) has ptxas, but no nvcc and no front end.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]

# Compute capabilities, times ten, to compile for where no GPU is visible. Machine code runs on the later minor versions
# of its major one: 80 is for 8.6 and 8.9 too, 100 for 10.3, 120 for 12.1.
ARCHITECTURES = (75, 80, 90, 100, 120)
# The compiler's front end takes longer than its assembler, so what is newer than this is assembled from this one's PTX.
# All of them take 270 s of processor time; 400 s with a front end each. The GPUs that are here have one each.
SHARED_PTX = 90
FIRST_PTX = 80  # what a later GPU would compile from older PTX has no tensor-core code
OLDEST_CUDA = 12  # no torch that this works with is built for an older one


def _say(*command: str) -> str:
    """What a program prints, or nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def compiler_version(nvcc: str) -> str:
    """Of an nvcc, e.g. "13.0"; "0" of what is none."""
    stated = re.search(r"release (\d+\.\d+)", _say(nvcc, "--version"))
    return stated[1] if stated else "0"


def _major(version: str) -> int:
    return int(version.split(".")[0])


def system_nvcc() -> str | None:
    """Path of an installed nvcc that is not too old: CUDACXX, CUDA_HOME, PATH, or the usual place."""
    homes = [os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [os.environ.get("CUDACXX"), *homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    found = (path for path in candidates if path and os.path.isfile(path) and os.access(path, os.X_OK))
    return next((path for path in found if _major(compiler_version(path)) >= OLDEST_CUDA), None)


def torch_cuda() -> str | None:
    """CUDA version of the torch that is installed already: "13.0"; "" if it was built without; None without torch.

    pip's isolated build hides, by PYTHONPATH, the packages of the environment that it installs into, but runs that
    environment's interpreter; which, asked without PYTHONPATH, says where torch is. uv runs another one: None.
    """
    shown = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    find = (
        "import importlib.util, sys; sys.path[:1] = sys.argv[1:]; torch = importlib.util.find_spec('torch');"
        "print(*(torch.submodule_search_locations if torch else []), sep='\\n')"
    )
    command = [sys.executable, "-c", find, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    folders = subprocess.run(command, env=shown, capture_output=True, text=True, check=False).stdout.splitlines()
    for version in (Path(folder, "version.py") for folder in folders):
        text = version.read_text() if version.is_file() else ""
        stated = re.search(r"^cuda\b.*= *(None|['\"](\d+\.\d+)['\"])", text, re.M)
        if stated:
            return stated[2] or ""
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not to be built, or None if they are."""
    wish = os.environ.get("AFA_CUDA")
    if wish == "0":
        return "AFA_CUDA=0 was set when this was built"
    if wish != "1" and torch_cuda() == "":
        return "torch had no CUDA when this was built (install one that has it and reinstall this, or set AFA_CUDA=1)"
    return None


def driver_note(version: str) -> str | None:
    """What to know where the kernels' CUDA version needs a newer driver than torch's."""
    torch = torch_cuda()
    if not torch or _major(torch) >= _major(version):
        return None
    return (
        f"torch is built for CUDA {torch}, these kernels by {version}: they need a driver for CUDA {_major(version)}."
        f" For an older one install the CUDA {_major(torch)} toolkit (there are no wheels of it), set CUDA_HOME to it"
        " and reinstall this"
    )


def known_architectures(nvcc: str) -> list[int]:
    """What a compiler can compile for, e.g. [75, 80, 86, 90]; of one that does not say, the least."""
    known = {int(number) for number in re.findall(r"^compute_(\d+)$", _say(nvcc, "--list-gpu-arch"), re.M)}
    return sorted(known) or [FIRST_PTX]


def visible_architectures() -> list[int]:
    """Compute capabilities of the GPUs here, times ten."""
    stated = _say("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", stated, re.M)})


def architectures(known: list[int], visible: list[int]) -> tuple[str, str | None]:
    """CMake's list of what to compile for, e.g. "75-real;80", and what to know where the compiler lacks a visible GPU.

    Machine code for the visible GPUs or, without, for `ARCHITECTURES`, as far as the compiler knows them; and PTX of
    the newest (without a GPU of `SHARED_PTX`), which the driver compiles for newer GPUs when kernels are first used.
    """
    wanted = visible or ARCHITECTURES
    code = {gpu: next((arch for arch in (gpu, gpu // 10 * 10) if arch in known), None) for gpu in wanted}
    real = sorted(set(filter(None, code.values())))
    newest = max(wanted)
    ptx = code[newest] or max((arch for arch in known if arch < newest), default=0)
    listed = [f"{arch}-real" for arch in real if arch != ptx or ptx < FIRST_PTX]
    if ptx >= FIRST_PTX:
        listed.append(f"{ptx}" if ptx in real else f"{ptx}-virtual")
    if not visible and SHARED_PTX in real:
        ptx = SHARED_PTX
        listed = [f"{arch}-real" if arch != ptx else f"{arch}" for arch in real]
    lacking = [gpu for gpu in visible if code[gpu] is None]
    if not lacking:
        return ";".join(listed), None
    note = f"the compiler does not know compute capability {', '.join(f'{gpu / 10:.1f}' for gpu in lacking)}"
    if newest in lacking and ptx >= FIRST_PTX:
        note += f": there the driver compiles PTX of {ptx / 10:.1f} when the kernels are first used"
    return ";".join(listed) or architectures(known, [])[0], note


def front_ends(listed: str) -> tuple[str, str]:
    """Of `architectures` for no visible GPU: what has a front end of its own, and what shares that of `SHARED_PTX`."""
    names = listed.split(";")
    if f"{SHARED_PTX}" not in names:
        return listed, ""
    later = [name for name in names if int(name.removesuffix("-real")) > SHARED_PTX]
    return ";".join(name for name in names if name not in later), ";".join(later).replace("-real", "")


def sources_digest() -> str:
    """SHA-256 of all that the native module is compiled from: equal to `build_info()["sources"]` unless it is stale."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *filter(Path.is_file, (ROOT / "csrc").rglob("*"))]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _with_cuda(requirements: list[str]) -> list[str]:
    linux = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    compiles = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if linux and compiles and system_nvcc() is None and why_no_cuda() is None:
        return requirements + CUDA_WHEELS
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _with_cuda(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_cuda(_setuptools.get_requires_for_build_editable(config_settings))
