"""The code in docs/ runs as it is printed there, assertions and all, with public names only; links lead somewhere."""

from __future__ import annotations

import ast
import re

import pytest
from support.common import ROOT
from support.documents import DOCUMENTS, FENCED, anchors, links, without_code

import afa_kernels

BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.S | re.M)
MOST_NOT_RUN = 2


def code(text: str, not_run: bool = False) -> str:
    """All Python blocks of a document, each at the line it has there, so that errors point into it. Those that are
    marked as not to be run are left out.
    """
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        if block[1] is None or not_run:
            first = text.count("\n", 0, block.start(2))
            body = block[2].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines)


WITH_CODE = [name for name, text in DOCUMENTS.items() if BLOCK.search(text)]
RUN = [name for name in WITH_CODE if code(DOCUMENTS[name]).strip()]


def test_there_is_code_to_run():
    assert {"docs/other_affinities.md", "docs/one_operator.md", "docs/operators/par.md"} <= set(RUN)


@pytest.mark.parametrize("name", RUN)
def test_code_of_a_document_runs(name):
    source = code(DOCUMENTS[name])
    exec(compile(source, str(ROOT / name), "exec"), {"__name__": name})


def test_few_blocks_are_not_run():
    marked = [block for text in DOCUMENTS.values() for block in BLOCK.finditer(text) if block[1]]
    assert 0 < len(marked) <= MOST_NOT_RUN
    for name in WITH_CODE:
        compile(code(DOCUMENTS[name], not_run=True), name, "exec")


def test_python_goes_by_one_name():
    languages = {block[1] for text in DOCUMENTS.values() for block in FENCED.finditer(text)}
    assert languages <= {"", "python", "cpp", "bash", "bibtex"}  # "py" would not be run


@pytest.mark.parametrize("name", WITH_CODE)
def test_documents_use_public_names(name):
    for node in ast.walk(ast.parse(code(DOCUMENTS[name], not_run=True))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("afa_kernels"):
            names = {alias.name for alias in node.names}
            if node.module == "afa_kernels":
                assert names <= set(afa_kernels.__all__)
            else:
                assert node.module.startswith("afa_kernels.compat")
                assert not any(each.startswith("_") for each in names)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target, anchor in links(DOCUMENTS[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            document = path.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(DOCUMENTS[document]), f"{target}#{anchor}"


def test_code_holds_no_links():
    assert list(links("[a](b.md#c), `x[0](y)`\n\n    z[1](w)\n\n```python\nu[2](v)\n```\n")) == [("b.md", "c")]
    assert "keep" in without_code("keep\n\n    gone\n")


def test_anchors_are_those_of_github_and_of_the_site():
    text = "# A title\n\n```\n# no title\n```\n## What `x.y` costs\n### One - two\n## Again\n## Again\n"
    assert anchors(text) == {"a-title", "what-xy-costs", "again"}  # the two disagree about dashes and repetitions


def test_the_tests_that_are_named_are_there():
    sources = {path.relative_to(ROOT / "tests"): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in sources.values() for name in re.findall(r"def (test_\w+)", text)}
    named = set(re.findall(r"\b(test_\w+(?:\.py)?)", DOCUMENTS["docs/robustness.md"]))
    files = {path.name for path in sources}
    assert len(named) > 50 and {name for name in named if name not in functions and name not in files} == set()
