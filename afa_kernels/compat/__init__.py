"""Switch another repository to these operators without editing it.

    import afa_kernels.compat
    import their_training_code
    afa_kernels.compat.patch()

`patch` looks through the modules that are already imported for classes named ``PAR`` or ``PAMR`` whose constructor and
forward take what the published classes take, and puts `afa_kernels.PAR` or `afa_kernels.PAMR` in their place.

``patch(pydensecrf=True)`` and ``patch(rloss=True)`` also put `afa_kernels.compat.pydensecrf` and `.rloss` in place of
those packages, installed or not: in modules that have imported them, and for every import that follows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from ..ops.par import PAMR, PAR
from .stand_ins import PACKAGES, stand_in


class Replacement(NamedTuple):
    """A class that `patch` came upon: where, what was there, what is there now (None: left alone, for ``reason``)."""

    module: ModuleType
    name: str
    old: type
    new: type | None
    reason: str

    def __str__(self) -> str:
        place = f"{self.module.__name__}.{self.name}"
        if self.new is None:
            return f"afa_kernels.compat: left {place} alone: {self.reason}"
        return f"afa_kernels.compat: {place} -> afa_kernels.{self.new.__name__}"

    def undo(self) -> None:
        """Put back what was there."""
        if self.new is not None:
            setattr(self.module, self.name, self.old)


class Replacements(list):
    """What `patch` did; `undo` takes it back."""

    def undo(self) -> None:
        for row in reversed(self):
            row.undo()


# Our class, and the arguments of the published constructor in their order, which calls by position rely on.
_KNOWN: dict[str, tuple[type[nn.Module], tuple[str, str]]] = {
    "PAR": (PAR, ("dilations", "num_iter")),
    "PAMR": (PAMR, ("num_iter", "dilations")),
}


def _arguments(function: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [value for value in list(inspect.signature(function).parameters.values())[1:] if value.kind in kinds]


def _mismatch(found: type, wanted: tuple[str, str]) -> str | None:
    """Why a class is not the published one, or None: same constructor arguments in order, a forward of two tensors."""
    if not issubclass(found, nn.Module):
        return "not a torch module"
    try:
        constructor, forward = _arguments(found.__init__), _arguments(found.forward)
    except (TypeError, ValueError):
        return "its signature cannot be read"
    names = tuple(value.name for value in constructor[:2])
    if names != wanted:
        return f"its constructor takes ({', '.join(names)}), not ({', '.join(wanted)})"
    extra = [value.name for value in constructor[2:] if value.default is inspect.Parameter.empty]
    if extra:
        return f"its constructor also needs {', '.join(extra)}"
    needed = [value.name for value in forward if value.default is inspect.Parameter.empty]
    if len(needed) != 2:
        return f"its forward takes {len(needed)} tensors, not an image and a mask"
    return None


def _with_names(ours: type[nn.Module], theirs: type) -> type[nn.Module]:
    """Our class, or a subclass whose forward takes the other repository's argument names as well."""
    own = [value.name for value in _arguments(ours.forward)]
    other = [value.name for value in _arguments(theirs.forward)][:2]
    if other == own:
        return ours

    def forward(self, *args, **kwargs):
        for mine, name in zip(own, other):
            if name in kwargs:
                kwargs[mine] = kwargs.pop(name)
        return ours.forward(self, *args, **kwargs)

    return type(ours.__name__, (ours,), {"forward": forward, "__module__": ours.__module__, "__doc__": ours.__doc__})


def patch(
    modules: Iterable[ModuleType] | None = None,
    *,
    pydensecrf: bool = False,
    rloss: bool = False,
    verbose: bool = True,
) -> Replacements:
    """Put `PAR` and `PAMR` in place of the published classes of those names.

    Args:
        modules: where to look; default every imported module but PyTorch's and our own.
        pydensecrf: also have ``import pydensecrf`` and its parts give `afa_kernels.compat.pydensecrf`, here and in
            modules that have imported it.
        rloss: also have ``import bilateralfilter`` give `afa_kernels.compat.rloss`, likewise.
        verbose: print a line for each class that was replaced, and for each of that name that was not, with the reason;
            and for what the other two changed.

    Returns:
        What was found, a list of `Replacement` and `stand_ins.StandIn`; its ``undo()`` puts all of it back (what was
        imported in between stays as it is). Call it before models are built: instances that already exist keep their
        class. Checkpoints load either way, the state keys are the same.
    """
    done = Replacements()
    foreign = []
    for module in list(sys.modules.values()) if modules is None else modules:
        top = (getattr(module, "__name__", None) or "").partition(".")[0]
        if modules is not None or top not in ("torch", "torchvision", "timm", "afa_kernels", "afa_model"):
            foreign.append(module)
    for module in foreign:
        for name, (ours, wanted) in _KNOWN.items():
            found = getattr(module, "__dict__", {}).get(name)
            if not inspect.isclass(found) or issubclass(found, ours):
                continue
            reason = _mismatch(found, wanted)
            new = _with_names(ours, found) if reason is None else None
            if new is not None:
                setattr(module, name, new)
            done.append(Replacement(module, name, found, new, reason or ""))
    for package, asked in zip(PACKAGES, (pydensecrf, rloss)):
        if asked:
            done += stand_in(package, [module for module in foreign if isinstance(module, ModuleType)])
    if verbose:
        print(*done, sep="\n", end="\n" if done else "")
        if not any(row.new for row in done) and not (pydensecrf or rloss):
            print("afa_kernels.compat: found nothing to replace; import the other repository's modules first")
    return done
