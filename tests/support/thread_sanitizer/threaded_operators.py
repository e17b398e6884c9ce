"""The native CPU operators, four threads each, called from four Python threads at once: for ThreadSanitizer to watch.

Run by test_threads.py with the sanitizer's runtime preloaded and ``tests`` on the path: ``python threaded_operators.py
LIBRARY [race]``. PyTorch itself stays on one thread; only this project's code is instrumented.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

if __name__ == "__main__" and sys.argv[2:] == ["race"]:  # PyTorch takes ten seconds to load under a sanitizer
    ctypes.CDLL(sys.argv[1]).afa_planted_race()
    sys.exit()

import torch
from support.every_operator import everything

from afa_kernels.core import native_module


def load(library: str):
    loader = importlib.machinery.ExtensionFileLoader("_native", library)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_native", library, loader=loader))
    loader.exec_module(module)
    return module


class Recorded:
    """A module that knows which of its functions were looked up."""

    def __init__(self, module) -> None:
        self.module, self.used = module, set()

    def __getattr__(self, name: str):
        self.used.add(name)
        return getattr(self.module, name)


def main(library: str) -> None:
    torch.set_num_threads(1)
    module, original = load(library), native_module.native
    recorded = Recorded(module)
    for name, loaded in list(sys.modules.items()):
        if name.startswith("afa_kernels") and getattr(loaded, "native", None) is original:
            loaded.native = recorded
    with mock.patch.object(torch, "get_num_threads", lambda: 4):
        for dtype in (torch.float32, torch.float16):
            alone = everything(0, dtype)
            with ThreadPoolExecutor(4) as pool:
                for results in pool.map(everything, [0] * 4, [dtype] * 4):
                    assert all(torch.equal(got, want) for got, want in zip(results, alone, strict=True))
    missed = {name for name in dir(module) if name.endswith("_cpu")} - recorded.used
    assert not missed, f"nothing calls {sorted(missed)}"
    print("every operator ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
