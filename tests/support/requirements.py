"""What pyproject.toml asks for. Run, it prints what `pip install '.[test,real,serve]'` brings besides the package
itself, so that `make` can fetch it meanwhile.
"""

from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

settings = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
project = settings["project"]
extras = project["optional-dependencies"]


def brought(extra: str) -> list[str]:
    """What an extra names; of the package's own extras that it names, what those do."""
    own, found = f"{project['name']}[", []
    for each in extras[extra]:
        inner = each[len(own) : -1].split(",") if each.startswith(own) else []
        found += [name for part in inner for name in brought(part)] if inner else [each]
    return found


if __name__ == "__main__":
    names = [*project["dependencies"], *brought("test"), *brought("real"), *brought("serve")]
    print(*dict.fromkeys(names), sep="\n")
