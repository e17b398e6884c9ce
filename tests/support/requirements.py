"""Prints what `pip install '.[test,real]'` brings besides the package itself, so that `make` can fetch it meanwhile."""

from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]


def brought(extra: str) -> list[str]:
    """What an extra names, and what the package's own extras that it names do."""
    own = f"{project['name']}["
    inner = [name for each in extras[extra] if each.startswith(own) for name in each[len(own) : -1].split(",")]
    return [each for each in extras[extra] if not each.startswith(own)] + sum(map(brought, inner), [])


print(*project["dependencies"], *brought("test"), *brought("real"), sep="\n")
