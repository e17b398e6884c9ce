"""Build backend: setuptools, plus the CUDA compiler wheels as a build requirement where the system has no nvcc.

``pip install`` asks `get_requires_for_build_*` before it builds in its isolated environment, so no CUDA toolkit
need be installed. ``AFA_CUDA=0`` asks for none.
"""

from __future__ import annotations

import os
import platform
import shutil

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the other hooks are setuptools' own)

# One 13.0 line throughout: the compiler driver, its front end, the device code generator and the headers check one
# another.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def system_nvcc() -> str | None:
    """Path of an installed nvcc: CUDACXX, CUDA_HOME, PATH, or the usual place."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            candidates.append(os.path.join(root, "bin", "nvcc"))
    return next((path for path in candidates if path and os.path.isfile(path) and os.access(path, os.X_OK)), None)


def wants_cuda() -> bool:
    return os.environ.get("AFA_CUDA", "1") != "0"


def _with_cuda(requirements: list[str]) -> list[str]:
    linux_x86 = platform.system() == "Linux" and platform.machine() == "x86_64"
    compiles = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if wants_cuda() and linux_x86 and compiles and system_nvcc() is None:
        return requirements + CUDA_WHEELS
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _with_cuda(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_cuda(_setuptools.get_requires_for_build_editable(config_settings))
