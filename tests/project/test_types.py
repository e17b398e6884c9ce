"""The types of the public API: all are said, and a program that uses them is checked by mypy in strict mode."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest
from support.common import ROOT

import afa_kernels
import afa_model

CLIENT = ROOT / "tests" / "support" / "typed_client.py"


def test_a_typed_program_passes_in_strict_mode(tmp_path):
    """Lines of it that are wrong on purpose are found wrong: an `ignore` that nothing needs is an error too."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    options = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options, str(CLIENT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "no issues found in 1 source file" in done.stdout, done.stdout + done.stderr
    assert (ROOT / "afa_kernels" / "py.typed").exists() and (ROOT / "afa_model" / "py.typed").exists()


@pytest.mark.parametrize("package", [afa_kernels, afa_model])
def test_the_typed_program_uses_every_public_name(package):
    used = {
        node.attr
        for node in ast.walk(ast.parse(CLIENT.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == package.__name__
    }
    assert set(package.__all__) - used == set()


def untyped(function: object) -> list[str]:
    """Parameters that have no type, and whether the result has none."""
    signature = inspect.signature(function)
    found = [name for name, each in signature.parameters.items() if each.annotation is each.empty and name != "self"]
    return found + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("name", afa_kernels.__all__)
def test_every_argument_and_result_has_a_type(name):
    public = getattr(afa_kernels, name)
    calls = ("__init__", "forward", "__call__")
    functions = [public]
    if inspect.isclass(public):
        functions = [vars(public)[call] for call in calls if inspect.isfunction(vars(public).get(call))]
    assert {function.__name__: untyped(function) for function in functions if untyped(function)} == {}
