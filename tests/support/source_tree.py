"""The sources as they are checked out, elsewhere, and the distributions that are built of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from support.common import ROOT

# Beside csrc and the packages: what builds, and what tells.
TOP = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "build_backend.py",
    "pyproject.toml",
    "setup.py",
)
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def package_files() -> set[str]:
    """What is to be in an installation, by its path here."""
    folders = [ROOT / package for package in ("afa_kernels", "afa_model")]
    found = {path for folder in folders for kind in ("*.py", "*.yaml", "py.typed") for path in folder.rglob(kind)}
    return {path.relative_to(ROOT).as_posix() for path in found if path.name != "_build_info.py"}


def copy(folder: Path) -> None:
    """Into a folder that is there, without what a build has left in them."""
    for name in TOP:
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("afa_kernels", "afa_model"):
        ignored = shutil.ignore_patterns("_native*.so", "_build_info.py", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)


def sdist(folder: Path) -> Path:
    """The source distribution, built in an empty folder."""
    copy(folder)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive
