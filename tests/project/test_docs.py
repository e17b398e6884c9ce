"""The code in docs/ runs as it is printed there, assertions and all, with public names only."""

from __future__ import annotations

import ast
import re

import pytest
from support.common import ROOT

import afa_kernels

DOCUMENTS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def code(text: str) -> str:
    """All Python blocks of a document, each at the line it has there, so that errors point into it."""
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(1))
        body = block[1].splitlines()
        lines[first : first + len(body)] = body
    return "\n".join(lines)


WITH_CODE = [name for name, text in DOCUMENTS.items() if FENCE.search(text)]


def test_there_is_code_to_run():
    assert "other_affinities" in WITH_CODE


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_of_a_document_runs(name):
    source = code(DOCUMENTS[name])
    exec(compile(source, str(ROOT / "docs" / f"{name}.md"), "exec"), {"__name__": name})


@pytest.mark.parametrize("name", WITH_CODE)
def test_documents_use_public_names(name):
    for node in ast.walk(ast.parse(code(DOCUMENTS[name]))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("afa_kernels"):
            assert node.module == "afa_kernels" and {alias.name for alias in node.names} <= set(afa_kernels.__all__)


@pytest.mark.parametrize("name", ["README", *DOCUMENTS])
def test_links_lead_somewhere(name):
    path = ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_tests_that_are_named_are_there():
    sources = {path.relative_to(ROOT / "tests"): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in sources.values() for name in re.findall(r"def (test_\w+)", text)}
    named = set(re.findall(r"\b(test_\w+(?:\.py)?)", DOCUMENTS["robustness"]))
    files = {path.name for path in sources}
    assert len(named) > 50 and {name for name in named if name not in functions and name not in files} == set()
