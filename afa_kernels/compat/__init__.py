"""Switch another repository to these operators without editing it.

    import afa_kernels.compat
    afa_kernels.compat.patch()            # before or after the other repository's modules are imported

or, without a line in it: ``python -m afa_kernels.compat their_script.py its arguments``.

`patch` finds the classes named ``PAR`` and ``PAMR``, those that exist and those that are made later, and replaces their
``forward``: by our kernels where they are proven to give the same as the class's own, which else goes on (`in_place`).

``patch(pydensecrf=True)`` and ``patch(rloss=True)`` also put `afa_kernels.compat.pydensecrf` and `.rloss` in place of
those packages, installed or not: in modules that have imported them, and for every import that follows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

from . import later
from .in_place import NAMES, Served, every_class, is_ours, why_not
from .stand_ins import PACKAGES, stand_in


class Replacement(NamedTuple):
    """A class that `patch` came upon; ``served`` is None where it was left alone, for ``reason``."""

    owner: type
    served: Served | None
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.owner.__module__}.{self.owner.__qualname__}"
        if self.served is None:
            return f"afa_kernels.compat: left {name} alone: {self.reason}"
        return f"afa_kernels.compat: {name} is served by the kernels where they are proven to give the same"

    def undo(self) -> None:
        """Put its own forward back."""
        if self.served is not None:
            self.served.undo()


class Replacements(list):
    """What `patch` did, and does to classes that are made later; `undo` takes it back."""

    verbose = False

    def undo(self) -> None:
        """Put everything back; nothing made later is served either."""
        later.stop(self._made)
        for row in reversed(self):
            row.undo()
        _active[:] = [each for each in _active if each is not self]

    def _made(self, owner: type) -> None:
        row = _serve(owner)
        if row is not None:
            self.append(row)
            if self.verbose:
                print(row, file=sys.stderr, flush=True)


_active: list[Replacements] = []


def _serve(owner: type) -> Replacement | None:
    """None for what is none of ours to touch, or served already."""
    if is_ours(owner) or hasattr(owner.forward, "afa_served"):
        return None
    reason = why_not(owner)
    if reason is not None:
        return Replacement(owner, None, reason)
    served = Served(owner)
    try:
        served.begin()
    except (AttributeError, TypeError) as error:  # as a metaclass has it
        return Replacement(owner, None, f"its forward cannot be replaced ({error})")
    return Replacement(owner, served)


def _classes(modules: list[ModuleType] | None) -> list[type]:
    """Of the two names, their own or a module's for them: all there are, or those that these modules hold."""
    looked_at = list(sys.modules.values()) if modules is None else modules
    places = [getattr(module, "__dict__", {}) for module in looked_at]
    called = {id(place[name]) for place in places for name in NAMES if name in place}
    found = [each for each in every_class() if each.__name__ in NAMES or id(each) in called]
    if modules is not None:
        held = {id(value) for place in places for value in place.values()}
        found = [each for each in found if id(each) in held]
    return found


def patch(
    modules: Iterable[ModuleType] | None = None,
    *,
    pydensecrf: bool = False,
    rloss: bool = False,
    verbose: bool = True,
) -> Replacements:
    """Serve classes named PAR and PAMR by our kernels, where those give the same.

    Args:
        modules: where to look; default everywhere, and from then on every class that is made.
        pydensecrf: also have ``import pydensecrf`` and its parts give `afa_kernels.compat.pydensecrf`, here and in
            modules that have imported it.
        rloss: also have ``import bilateralfilter`` give `afa_kernels.compat.rloss`, likewise.
        verbose: print a line on stderr for each class that is served, and for each of that name that is not, with the
            reason; and for what the other two changed. What a proof finds different is always said there, once.

    Returns:
        What was found, a list of `Replacement` and `stand_ins.StandIn`; its ``undo()`` puts all of it back (what was
        imported of the packages in between stays as it is). Classes, instances, state keys and attributes stay what
        they are: instances that exist already are served too, by the numbers they have when they are called.
    """
    looked_at = None if modules is None else list(modules)
    done = Replacements()
    done.verbose = verbose
    done += filter(None, (_serve(owner) for owner in _classes(looked_at)))
    if looked_at is None:
        later.start(done._made)
    foreign = list(sys.modules.values()) if looked_at is None else looked_at
    for package, asked in zip(PACKAGES, (pydensecrf, rloss)):
        if asked:
            done += stand_in(package, [module for module in foreign if _foreign(module)])
    _active.append(done)
    if verbose:
        print(*done, sep="\n", end="\n" if done else "", file=sys.stderr, flush=True)
    return done


def _foreign(module: object) -> bool:
    return isinstance(module, ModuleType) and module.__name__.partition(".")[0] not in ("torch", "afa_kernels")


def unpatch() -> None:
    """Put back what every `patch` so far has changed."""
    for done in reversed(_active.copy()):
        done.undo()


def served() -> list[Served]:
    """The classes that are served now, with their counts."""
    return [row.served for done in _active for row in done if isinstance(row, Replacement) and row.served is not None]
