"""The example in the docstring of every public operator runs as it is printed there and gives what it says."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import afa_kernels

ROWS = {"CheckRow", "CheckTable"}  # what self_check returns
NAMES = [name for name in afa_kernels.__all__ if name not in ROWS]


def examples(name: str) -> doctest.DocTest:
    text = inspect.getdoc(getattr(afa_kernels, name))
    assert "\nExamples:\n    >>> " in text
    return doctest.DocTestParser().get_doctest(text, {}, name, name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_an_operator_runs(name, monkeypatch):
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    torch.manual_seed(0)
    said: list[str] = []
    test = examples(name)
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)
    public = [f"from afa_kernels import {name}", f"from afa_kernels import {name},", f", {name}\n"]
    assert any(part in "".join(example.source for example in test.examples) for part in public)


def test_a_wrong_example_is_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", "wrong", 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1
