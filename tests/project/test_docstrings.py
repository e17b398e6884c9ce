"""The examples in docstrings run and give what they say, wherever in the packages they stand."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re

import pytest
from support.common import ROOT

import afa_kernels

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules_with_examples() -> list[str]:
    """Names of the modules whose text has a prompt. Only these are imported."""
    found = []
    for package in ("afa_kernels", "afa_model"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def failures(module) -> list[str]:
    """What the examples of a module, its functions, classes and their methods got wrong."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    for test in tests:
        runner.run(test, out=said.append)
    return said if runner.failures else []


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings_run(name):
    found = failures(importlib.import_module(name))
    assert not found, "".join(found)


def test_examples_have_the_heading_that_the_site_takes_for_code():
    """Under "Example:" they would be read as Markdown, lists in them as links."""
    texts = [
        path.read_text(encoding="utf-8")
        for name in ("afa_kernels", "afa_model")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert sum("\n    Examples:\n        >>> " in text for text in texts) > 10
    assert not any(re.search(r"^ *Example:$", text, re.M) for text in texts)


ROWS = {"CheckRow", "CheckTable"}  # what self_check returns


@pytest.mark.parametrize("name", sorted(set(afa_kernels.__all__) - ROWS))
def test_every_public_operator_has_an_example_that_calls_it(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(afa_kernels, name)))
    code = ast.parse("".join(example.source for example in examples))
    called = {node.func.id for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    imported = {alias.name for node in ast.walk(code) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in called & imported


def test_a_wrong_example_is_told(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text(
        'class Box:\n    def two(self):\n        """Two.\n\n        >>> Box().two()\n        3\n        """\n'
        '        return 2\n\n\ndef right():\n    """\n    >>> right()\n    1.0...\n    """\n    return 1.04\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = "".join(failures(importlib.import_module("wrong_example")))
    assert "Box().two()" in found and "Got:\n    2" in found and "right" not in found
