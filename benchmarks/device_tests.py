"""Which test files run on the device that AFA_TEST_DEVICE names: python device_tests.py cuda|operators|model [TESTS]

A file does when it puts something on the tests' DEVICE, itself or through a helper beside the tests; to compare DEVICE,
as a file that is skipped on a GPU does, is not to use it. "model" are those of them that import the model's package,
"operators" those that do not. "cuda" are the other files with tests marked ``cuda``: run them with -m cuda.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
KINDS = ("cuda", "operators", "model")


def _outside_comparisons(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Compare):
            yield from _outside_comparisons(child)


def _marks_cuda(tree: ast.AST) -> bool:
    """Whether ``pytest.mark.cuda`` is in it."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "cuda")
    return any(isinstance(node.value, ast.Attribute) and node.value.attr == "mark" for node in found)


def _names_device(tree: ast.AST) -> bool:
    for node in _outside_comparisons(tree):
        if isinstance(node, ast.Name) and node.id == "DEVICE" and isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.Attribute) and node.attr == "DEVICE":
            return True
    return False


def _imports(tree: ast.AST) -> set[str]:
    """Every part of every imported module's name: ``support.par_cases`` is support and par_cases."""
    names: list[str] = []
    blocks = [tree]
    while blocks:  # statements alone: an expression imports nothing
        node = blocks.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            blocks += value if isinstance(value := getattr(node, part, ()), list) else ()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(alias.name for alias in node.names)]
    return {part for name in names for part in name.split(".")}


def _for_the_cpu_only(tree: ast.Module) -> bool:
    """Whether the file's ``pytestmark`` skips all of it where DEVICE is not "cpu"."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    marks = [node for node in assigned if any(getattr(to, "id", None) == "pytestmark" for to in node.targets)]
    for node in (node for mark in marks for node in ast.walk(mark)):
        if isinstance(node, ast.Compare) and getattr(node.left, "id", None) == "DEVICE":
            value = getattr(node.comparators[0], "value", None)
            if isinstance(node.ops[0], ast.NotEq) and value == "cpu":
                return True
    return False


def device_tests(tests: Path = TESTS) -> dict[str, list[str]]:
    """The files of each kind, sorted; relative to the folder that holds ``tests``."""
    texts = {path: path.read_text() for path in sorted(tests.rglob("*.py"))}
    trees = {path: ast.parse(text, str(path)) for path, text in texts.items()}
    imports = {path: _imports(tree) for path, tree in trees.items()}
    names_device = {path for path, text in texts.items() if "DEVICE" in text and _names_device(trees[path])}
    helpers = {path for path in trees if not path.name.startswith(("test_", "conftest"))}
    using = {path.stem for path in helpers & names_device}
    while more := {path.stem for path in helpers if path.stem not in using and imports[path] & using}:
        using |= more
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for path, tree in trees.items():
        if not path.name.startswith("test_") or _for_the_cpu_only(tree):
            continue
        file = str(path.relative_to(tests.parent))
        if path in names_device or imports[path] & using:
            found["model" if "afa_model" in imports[path] else "operators"].append(file)
        elif "cuda" in texts[path] and _marks_cuda(tree):
            found["cuda"].append(file)
    return found


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in KINDS or len(arguments) > 2:
        sys.exit(__doc__)
    print("\n".join(device_tests(*map(Path, arguments[1:]))[arguments[0]]))


if __name__ == "__main__":
    main(sys.argv[1:])
