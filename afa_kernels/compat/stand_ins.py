"""Our modules under the names of packages that no longer install: ``pydensecrf`` and rloss's ``bilateralfilter``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

# Package -> the names of its modules -> ours.
PACKAGES = {
    "pydensecrf": {
        "pydensecrf": "afa_kernels.compat.pydensecrf",
        "pydensecrf.densecrf": "afa_kernels.compat.pydensecrf.densecrf",
        "pydensecrf.utils": "afa_kernels.compat.pydensecrf.utils",
    },
    "rloss": {"bilateralfilter": "afa_kernels.compat.rloss"},
}


class StandIn(NamedTuple):
    """A name that `patch` changed: an entry of ``sys.modules`` (``module`` None), or what a module had imported."""

    module: ModuleType | None
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        place = f"import {self.name}" if self.module is None else f"{self.module.__name__}.{self.name}"
        kind = self.new.__name__ if isinstance(self.new, ModuleType) else f"{self.new.__module__}.{self.new.__name__}"
        return f"afa_kernels.compat: {place} -> {kind}"

    def undo(self) -> None:
        """Put back what was there."""
        if self.module is not None:
            setattr(self.module, self.name, self.old)
        elif self.old is not None:
            sys.modules[self.name] = self.old
        else:
            sys.modules.pop(self.name, None)


def stand_in(package: str, modules: Iterable[ModuleType]) -> list[StandIn]:
    """Have ``import`` give our modules for those of ``package`` (of `PACKAGES`), whether or not it is installed, and
    put ours in place of what ``modules`` have imported of it.
    """
    ours = {name: importlib.import_module(path) for name, path in PACKAGES[package].items()}
    done = []
    for module in modules:
        if module.__name__ in ours or module in ours.values():
            continue
        for name, value in list(vars(module).items()):
            new = _in_place_of(value, ours)
            if new is not None and new is not value:
                setattr(module, name, new)
                done.append(StandIn(module, name, value, new))
    for name, module in ours.items():
        old = sys.modules.get(name)
        if old is not module:
            sys.modules[name] = module
            done.append(StandIn(None, name, old, module))
    return done


def _in_place_of(value: Any, ours: dict[str, ModuleType]) -> Any:
    """Ours for a module of theirs, and for a class, function or number that one of them defines; else None."""
    if isinstance(value, ModuleType):
        return ours.get(value.__name__)
    try:
        home, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    except Exception:  # a proxy of something that is not there yet
        return None
    # What SWIG wraps is of the compiled half of the module.
    home = home.removeprefix("_") if isinstance(home, str) else None
    return getattr(ours[home], name, None) if home in ours and isinstance(name, str) else None
