"""The contract between an operator's front and its backends, and how the one finds the other.

A backend of an operator is a module beside its functional.py: ``native.py`` for the backend ``"native"``,
``triton_impl.py`` for ``"triton"``. What holds for each:

- It has the functions that the front calls, under the same names and with the same arguments as in the other backend
  (those of operators that are registered for native alone, native.py has): each a kernel of the operator, forward or
  backward, or the memory that one of them writes into. What only the module itself calls begins with an underscore.
- Arguments are checked: shapes, dtypes and devices are what the public function promises, numbers are plain Python
  ones, sequences are lists, defaults are filled in. Tensors may have any strides and must not be written to. float64
  does not come here, and neither do tensors that the predicate of `core.backends` has turned away.
- It returns new tensors, contiguous or laid out as the input that they belong to, in the dtype and of the shape that
  the operator's fake (``register_fake``) says. A gradient that is not ``wanted`` comes back empty.
- It knows nothing of autograd: the front calls it within a custom operator.
- The same inputs give the same bits every time.

The reference is no such module: it takes what the public function takes, and only fronts call it, in their branch for
the backend ``"reference"``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

MODULES = {"native": ".native", "triton": ".triton_impl"}


@functools.cache
def implementation(package: str, backend: str) -> ModuleType:
    """The module of an operator's package that has a backend's kernels; Triton is imported when first asked for."""
    return importlib.import_module(MODULES[backend], package)
