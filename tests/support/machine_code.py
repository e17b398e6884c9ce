"""Reads the machine code of a GPU: the functions of a binary, and what stands in front of their exponentials."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    predicate: str | None
    name: str
    operands: list[str]


def functions(tool: str, binary: Path | str, arch: str | None = None) -> dict[str, str]:
    """Disassembly of every function, by its mangled name; ``tool`` is cuobjdump."""
    command = [tool, "--dump-sass", *(["-arch", f"sm_{arch}"] if arch else []), str(binary)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", code)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def instructions(code: str) -> list[Instruction]:
    pattern = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\d+)\s+)?([A-Z0-9_.]+)\s+(.*?)\s*;", re.MULTILINE)
    return [Instruction(m[1], m[2], [part.strip() for part in m[3].split(",")]) for m in pattern.finditer(code)]


def _register(operand: str) -> str:
    return re.sub(r"[-|~]|\.\w+", "", operand)


def before_exponentials(code: str) -> list[str]:
    """For each exponential the instruction that made its argument: ``FADD R -R`` for a difference of two registers.

    The way back is through products with a constant: the conversion to base 2, the halving of large arguments, a mean.
    """
    listing, found = instructions(code), []
    for end, exponential in enumerate(listing):
        if not exponential.name.startswith("MUFU.EX2"):
            continue
        register, source = _register(exponential.operands[1]), "nothing"
        for _, name, operands in reversed(listing[:end]):
            if _register(operands[0]) != register:
                continue
            inputs = operands[1:]
            scaled = [value for value in inputs if not re.match(r"-?[0-9.]", value)]
            if name.startswith("FMUL") and len(inputs) == 2 and len(scaled) == 1:
                register = _register(scaled[0])
                continue
            source = " ".join([name, *(re.sub(r"\bU?R\d+(\.\w+)*", "R", value) for value in inputs)])
            break
        found.append(source)
    return found
