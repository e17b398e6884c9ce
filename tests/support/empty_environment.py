"""An environment with nothing in it but what an installation of this package asks for, without a download: what pip
would bring is linked from the packages that are installed here.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement

from support.requirements import brought, project


def needed(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that these requirements bring, and those that they bring in turn, by name.

    Raises:
        PackageNotFoundError: one that this package asks for is not installed here.
    """
    left = [Requirement(each) for each in requirements]
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        asked = left.pop()
        key = asked.name.lower().replace("_", "-"), frozenset(asked.extras)
        if key in seen:
            continue
        seen.add(key)
        here = found[key[0]] = importlib.metadata.distribution(asked.name)
        for each in map(Requirement, here.requires or ()):
            extras = asked.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(each)
    return found


def make(folder: Path, extra: str | None = None) -> Path:
    """An environment for this package, or for it with an extra, but not the package itself; its Python."""
    venv.create(folder, symlinks=True)
    python = next(folder / name for name in ("bin/python", "Scripts/python.exe") if (folder / name).exists())
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    for distribution in needed([*project["dependencies"], *(brought(extra) if extra else [])]).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            place = Path(str(distribution.locate_file(top)))
            if place.exists() and not (packages / top).exists():
                (packages / top).symlink_to(place)
    return python


def pip(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """This environment's pip at work in another one."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *words]
    return subprocess.run(command, capture_output=True, text=True)
