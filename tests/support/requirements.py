"""Prints what `pip install '.[test,real]'` brings besides the package itself, so that `make` can fetch it meanwhile."""

from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["test"], *extras["real"], sep="\n")
