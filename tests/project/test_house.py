"""The house: which room each module is in, and that imports go down only. Files are read, nothing is imported.

A room is a folder or a file of a package, named by its path without .py. New modules go into a room that is there, or
their room into the list.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.common import ROOT

# Of each package all rooms, from top to bottom; the packages likewise.
ROOMS = {
    "afa_model": [
        "__main__",
        "cli",
        "commands",
        "reproduce",
        "__init__",
        "runs",
        "config",
        "web",
        "evaluation",
        "training",
        "pictures",
        "labels",
        "data",
        "networks",
        "runtime",
        "conventions",
        "errors",
    ],
    "afa_kernels": [
        "bench",
        "__init__",
        "par_modules",
        "compat",
        "ops/bilateral",
        "ops/path_affinity",
        "ops/pcm",
        "ops/sinkhorn",
        "ops/random_walk",
        "ops/feature_affinity",
        "ops/par",
        "ops/affinity",
        "ops/diffusion",
        "ops/__init__",
        "core",
        "_build_info",
    ],
}
OPERATORS = sorted(path.name for path in (ROOT / "afa_kernels" / "ops").iterdir() if (path / "functional.py").exists())


class Import(NamedTuple):
    """``module`` imports ``target`` and uses ``name`` of it, if it is a name; both as paths without .py."""

    module: str
    target: str
    name: str | None


@functools.cache
def modules_of(folder: Path) -> dict[str, ast.Module]:
    """The modules of a package by their paths."""
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): ast.parse(file.read_text()) for file in files}


def found(parts: list[str], modules: dict[str, ast.Module]) -> str | None:
    """The path of a dotted name, if it is a module of the package."""
    path = "/".join(parts)
    return next((name for name in (path, f"{path}/__init__".lstrip("/")) if name in modules), None)


def imports(package: str, modules: dict[str, ast.Module]) -> Iterator[Import]:
    """What the modules of a package import of each other, within functions too."""
    for module, tree in modules.items():
        here = [package, *module.split("/")[:-1]]
        bound: dict[str, str] = {}  # a name in this module -> the module it stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first, *rest = alias.name.split(".")
                    target = found(rest, modules) if first == package else None
                    if target is not None:
                        yield Import(module, target, None)
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                first, *parts = [*base, *(node.module.split(".") if node.module else [])]
                if first != package:
                    continue
                for alias in node.names:
                    inner = found([*parts, alias.name], modules)
                    if inner is not None:
                        bound[alias.asname or alias.name] = inner
                    target = inner or found(parts, modules) or "/".join(parts)
                    yield Import(module, target, None if inner else alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                yield Import(module, bound[node.value.id], node.attr)


def room_of(module: str, rooms: list[str]) -> str | None:
    return next((room for room in rooms if module == room or module.startswith(f"{room}/")), None)


def upward(package: str, modules: dict[str, ast.Module], rooms: list[str]) -> set[str]:
    """Imports of a room above or of none."""
    wrong = set()
    for module, target, _ in imports(package, modules):
        own, other = room_of(module, rooms), room_of(target, rooms)
        if own != other and (None in (own, other) or rooms.index(other) < rooms.index(own)):
            wrong.add(f"{module} imports {target}")
    return wrong


def private(package: str, modules: dict[str, ast.Module], rooms: list[str]) -> set[str]:
    """Names with an underscore that are used in another room than theirs."""
    hidden = [row for row in imports(package, modules) if row.name and row.name.startswith("_")]
    return {
        f"{module} uses {target}.{name}"
        for module, target, name in hidden
        if not name.endswith("__") and room_of(module, rooms) != room_of(target, rooms)
    }


# --- the rooms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_has_a_room_and_every_room_a_module(package):
    modules = modules_of(ROOT / package)
    taken = {module: room_of(module, ROOMS[package]) for module in modules}
    assert [module for module, room in taken.items() if room is None] == []
    assert [room for room in ROOMS[package] if room not in taken.values() and room != "_build_info"] == []


@pytest.mark.parametrize("package", ROOMS)
def test_imports_go_down_only(package):
    assert upward(package, modules_of(ROOT / package), ROOMS[package]) == set()


@pytest.mark.parametrize("package", ROOMS)
def test_private_names_stay_in_their_room(package):
    assert private(package, modules_of(ROOT / package), ROOMS[package]) == set()


@pytest.mark.parametrize("package", ROOMS)
def test_no_package_imports_one_above(package):
    order = list(ROOMS)
    above = order[: order.index(package)]
    for module, tree in modules_of(ROOT / package).items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {*above, "benchmarks", "tests"}, module


def test_what_is_wrong_is_seen():
    texts = {
        "__init__": "from .ops.walk import walk\nimport toy.core.checks",
        "ops/walk/__init__": "from .functional import walk",
        "ops/walk/functional": "from ...core import checks\nfrom ..blur import native\nchecks._hidden()",
        "ops/blur/native": "from ... import walk\ndef run():\n    from ...core.checks import _hidden",
        "core/checks": "from . import lost",
        "core/lost": "",
        "attic": "",
    }
    modules = {name: ast.parse(text) for name, text in texts.items()}
    rooms = ["__init__", "ops/blur", "ops/walk", "core"]
    assert room_of("attic", rooms) is None and room_of("core/lost", rooms) == "core"
    assert upward("toy", modules, rooms) == {
        "ops/walk/functional imports ops/blur/native",
        "ops/blur/native imports __init__",
    }
    hidden = {"ops/walk/functional uses core/checks._hidden", "ops/blur/native uses core/checks._hidden"}
    assert private("toy", modules, rooms) == hidden


# --- the operators ----------------------------------------------------------------------------------------------------


FRONTS = {"functional", "losses", "mean_field"}


def test_nothing_but_its_front_other_references_and_benchmarks_imports_a_reference():
    """What production shared with the oracle, no test of one against the other could see an error in."""
    for module, target, _ in imports("afa_kernels", modules_of(ROOT / "afa_kernels")):
        if target.endswith("/reference") and room_of(module, ROOMS["afa_kernels"]) != "bench":
            folder, _, name = module.rpartition("/")
            assert name == "reference" or (f"{folder}/reference" == target and name in FRONTS), (module, target)


def test_a_reference_takes_nothing_from_production():
    for module, target, _ in imports("afa_kernels", modules_of(ROOT / "afa_kernels")):
        assert not module.endswith("/reference") or target.endswith("/reference"), (module, target)


@pytest.mark.parametrize("operator", OPERATORS)
def test_its_backends_have_the_same_functions(operator):
    """`afa_kernels.core.implementations` says so, but for those of operators that are registered for native alone."""
    folder, functions = ROOT / "afa_kernels" / "ops" / operator, []
    for path in [path for path in (folder / "native.py", folder / "triton_impl.py") if path.exists()]:
        body = ast.parse(path.read_text()).body
        found = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        functions.append({node.name: [argument.arg for argument in node.args.args] for node in found})
    called = "".join(path.read_text() for path in folder.glob("*.py") if path.stem in FRONTS)
    shared = {name: found for name, found in functions[0].items() if name in functions[-1]}
    assert shared and shared == functions[-1]
    assert shared == functions[0] or '("native",)' in called
    assert [name for name in functions[0] if f".{name}(" not in called] == []


def test_no_module_has_the_name_of_a_public_function():
    """`afa_kernels.par` is the function, whoever imports what."""
    body = ast.parse((ROOT / "afa_kernels" / "__init__.py").read_text()).body
    assigned = next(node for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    public = {element.value for element in assigned.value.elts}
    assert "par" in public
    assert not public & {path.stem for path in (ROOT / "afa_kernels").iterdir()}
