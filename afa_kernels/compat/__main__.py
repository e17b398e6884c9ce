"""``python -m afa_kernels.compat script.py its arguments``, or ``-m module its arguments``: a script as it is, served.

PAR, PAMR, pydensecrf and rloss's bilateralfilter are those of this package; what was served, how often it was called
and how long that took is printed at the end, for this process; those that multiprocessing starts from it are served
too. Under torchrun: ``torchrun ... -m afa_kernels.compat script.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import served
from .counted import counted, packages
from .spawned import everything, patched_too

USAGE = "usage: python -m afa_kernels.compat SCRIPT.py [ARGUMENT...] | -m MODULE [ARGUMENT...]"


def main(argv: Sequence[str]) -> None:
    """Run it; see the module."""
    as_module = argv[:1] == ["-m"]
    rest = list(argv[as_module:])
    if rest[:1] in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0)
    if not rest or rest[0].startswith("-"):
        raise SystemExit(USAGE)
    if not as_module and not Path(rest[0]).exists():
        raise SystemExit(f"{USAGE}\nno such file: {rest[0]}")
    counts = packages()
    with counted(counts), patched_too():
        everything(verbose=True)
        # As Python itself: a script's own folder comes first on the path, a module's is where one stands.
        sys.argv = rest
        if not getattr(sys.flags, "safe_path", False):  # told not to (Python 3.11)
            sys.path[0] = os.getcwd() if as_module else str(Path(rest[0]).resolve().parent)
        try:
            if as_module:
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(rest[0], run_name="__main__")
        finally:
            print(report(counts), file=sys.stderr, flush=True)


def report(counts: dict[str, list[float]]) -> str:
    """What was served, a line for each class and function that was called."""
    lines = []
    for each in served():
        line = f"{each.name}: {each.calls} calls by the kernels in {each.seconds:.2f} s"
        if each.calls:
            line += f", by its own forward about {each.seconds + each.saved:.2f} s (by the proofs, on small images)"
        if each.kept:
            line += f"; {each.kept} calls by its own forward: {'; '.join(sorted(each.said))}"
        lines.append(line)
    lines += [f"{name}: {len(spent)} calls in {sum(spent):.2f} s" for name, spent in counts.items() if spent]
    return "\n".join(f"afa_kernels.compat: {line}" for line in lines or ["nothing of it was called"])


if __name__ == "__main__":
    main(sys.argv[1:])
