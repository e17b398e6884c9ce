"""Another repository's PAR and PAMR, served by our kernels where it is proven that they give the same.

The class stays what it is; its ``forward`` is replaced, so that aliases, registries, subclasses and instances that
exist already follow. Before an instance is first called in some way (by dtypes, numbers of channels, sizes, autocast,
gradients) its own forward and ours run on a small image with a low-contrast half (`proof`). Ours serves such calls
where the two agree and its own does nothing besides, such as writing, drawing random numbers or learning; else its own
does, as before, and that is said once. What is compiled or traced keeps its own.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from ..ops.par import PAMR, PAR, pamr, par
from .proof import AGREEMENT, Unfit, apart, sizes, small_pair, tried, undisturbed

NAMES = ("PAR", "PAMR")
MOST_CASES = 64  # an instance that is another one at every call is not worth a proof each
LEFT_ALONE = ("torch", "torchvision", "timm", "afa_kernels", "afa_model")
OF_MODULES = frozenset(vars(nn.Module()))  # what every instance has

_proof = threading.local()  # under way in this thread: what a forward calls in one is its own


@dataclass(frozen=True)
class Verdict:
    """What serves one kind of calls: ``call(image, mask)``, or the class's own forward, for ``reason``.

    ``ratio``: how many times as long its own forward took in the proof.
    """

    call: Callable[[Tensor, Tensor], Tensor] | None
    reason: str = ""
    ratio: float = 1.0


class Served:
    """A class whose forward was replaced, and what became of its calls.

    Attributes:
        owner: the class.
        theirs: its own forward.
        calls, seconds: of the kernels, the proofs not counted; on a GPU the host's time.
        saved: how many seconds longer its own forward would have taken, going by the proofs.
        kept: calls that its own forward answered.
        said: the reasons for that.
    """

    def __init__(self, owner: type[nn.Module]):
        self.owner, self.theirs = owner, owner.forward
        self.calls, self.kept, self.seconds, self.saved = 0, 0, 0.0, 0.0
        self.said: set[str] = set()
        self._signature = inspect.signature(self.theirs)
        self._names = [value.name for value in needed(self.theirs)]
        self._inherited = "forward" not in vars(owner)
        self._undone = False
        self._verdicts: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
        self._of_replicas: dict = {}  # those of DataParallel live for one call

    @property
    def name(self) -> str:
        """Module and name of the class."""
        return f"{self.owner.__module__}.{self.owner.__qualname__}"

    def begin(self) -> None:
        """Replace the forward."""
        serve, self._undone = self._forward, False

        def served(module, *arguments, **keywords):
            return serve(module, arguments, keywords)

        # torch.jit.script reads their text and looks names up where this function was made: there it is theirs.
        places = getattr(inspect.unwrap(self.theirs), "__globals__", served.__globals__)
        forward = wraps(self.theirs)(FunctionType(served.__code__, places, "forward", None, served.__closure__))
        forward.afa_served = self
        self.owner.forward = forward

    def undo(self) -> None:
        """Put its own forward back; from now on ours only calls it, whoever still holds it."""
        self._undone = True
        if getattr(vars(self.owner).get("forward"), "afa_served", None) is not self:
            return
        if self._inherited:
            del self.owner.forward
        else:
            self.owner.forward = self.theirs

    def _forward(self, module: nn.Module, arguments: tuple, keywords: dict) -> Any:
        under_way = self._undone or getattr(_proof, "under_way", False)
        pair = None if under_way else self._tensors(module, arguments, keywords)
        if pair is None:
            return self.theirs(module, *arguments, **keywords)
        verdict = self._verdict(module, *pair)
        if verdict.call is not None:
            start = time.perf_counter()
            try:
                out = verdict.call(*pair)
            except (TypeError, ValueError) as error:  # sizes that the kernels refuse
                verdict = Verdict(None, f"the kernels refuse this call ({error})")
            else:
                spent = time.perf_counter() - start
                self.calls, self.seconds = self.calls + 1, self.seconds + spent
                self.saved += spent * (verdict.ratio - 1)
                return out
        self._keep(verdict.reason)
        return self.theirs(module, *arguments, **keywords)

    def _tensors(self, module: nn.Module, arguments: tuple, keywords: dict) -> tuple[Tensor, Tensor] | None:
        """Image and mask of a call that can be served at all."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return None
        try:
            given = self._signature.bind(module, *arguments, **keywords).arguments
        except TypeError:
            return None  # its own forward says what is wrong
        image, mask = (given.get(name) for name in self._names)
        if len(given) != 3 or not (_plain(image) and _plain(mask)) or image.device != mask.device:
            self._keep("called with something else than an image and a mask of four dimensions on one device")
            return None
        return image, mask

    def _verdict(self, module: nn.Module, image: Tensor, mask: Tensor) -> Verdict:
        replica = getattr(module, "_is_replica", False)
        verdicts = self._of_replicas if replica else self._verdicts.setdefault(module, {})
        state = _state(module, not replica)
        case = (state, *_case(image, mask))
        if case in verdicts:
            return verdicts[case]
        if len(verdicts) >= MOST_CASES:
            return Verdict(None, f"it is called in more than {MOST_CASES} ways")
        _proof.under_way = True
        try:
            verdict = self._prove(module, image, mask)
        finally:
            _proof.under_way = False
        if _state(module, not replica) != state:
            verdict = Verdict(None, "a call changes the instance")
        verdicts[case] = verdict
        return verdict

    def _prove(self, module: nn.Module, image: Tensor, mask: Tensor) -> Verdict:
        if 1 not in (image.shape[0], mask.shape[0]) and image.shape[0] != mask.shape[0]:
            return Verdict(None, f"{image.shape[0]} images and masks of {mask.shape[0]}")
        if any(_hooks(each) for each in module.modules() if each is not module):
            return Verdict(None, "a module in it has hooks")
        learned = [value for *_, value in _held(module) if value.requires_grad and torch.is_grad_enabled()]
        try:
            pair = small_pair(image, mask)
            want, spent = undisturbed(partial(self.theirs, module), *pair, learned)
        except Unfit as error:
            return Verdict(None, str(error))
        except Exception as error:
            return Verdict(None, f"its own forward fails on a small image ({_brief(error)})")
        nearest, last = float("inf"), "its num_iter and dilations are not to be found"
        for label, call in candidates(module):
            try:
                got, ours = tried(call, *pair, learned)
            except Exception as error:
                last = f"{label} refuses the call ({_brief(error)})"
                continue
            deviation = apart(got, want)
            if deviation <= 1:
                return Verdict(call, ratio=spent / ours)
            if deviation < nearest:
                nearest = deviation
                last = f"it differs from {label} by {deviation * AGREEMENT:.2g} of the largest value"
            elif nearest == float("inf"):
                last = f"it gives another shape, dtype or gradient than {label}"
        return Verdict(None, last)

    def _keep(self, reason: str) -> None:
        self.kept += 1
        if reason not in self.said:
            self.said.add(reason)
            print(f"afa_kernels.compat: {self.name} keeps its own forward: {reason}", file=sys.stderr, flush=True)


def _brief(error: Exception) -> str:
    """PyTorch's own go on for pages."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def needed(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments behind ``self`` that a forward cannot go without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    values = list(inspect.signature(forward).parameters.values())[1:]
    return [value for value in values if value.kind in kinds and value.default is inspect.Parameter.empty]


def candidates(module: nn.Module) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """What of ours the instance may be: by its own numbers, the likeliest first."""
    dilations, num_iter = _setting(module, "dilations"), _setting(module, "num_iter")
    if dilations is None or num_iter is None:
        return
    w1, w2, w3 = (_setting(module, name) for name in ("w1", "w2", "w3"))
    # The published class calls both smoothing factors w1 and the share of the position term w2.
    factors = [(w1, w1, w2), (w1, w2, w3), (0.3, 0.3, 0.01), (w1, w1, 0.0), (0.3, 0.3, 0.0)]
    factors = list(dict.fromkeys(each for each in factors if all(isinstance(one, (int, float)) for one in each)))
    for resize in ("mask", "image"):
        calls = {f"PAR with factors {each}": partial(par, w1=each[0], w2=each[1], w3=each[2]) for each in factors}
        for label, call in (*calls.items(), ("PAMR", pamr)):
            bound = partial(call, dilations=dilations, num_iter=num_iter, resize=resize)
            yield f"{label}, {num_iter} iterations, the {resize} resized", bound


def _setting(module: nn.Module, name: str) -> Any:
    """Of the instance or, as PAMR's dilations, of a module in it."""
    return next((vars(each)[name] for each in module.modules() if name in vars(each)), getattr(module, name, None))


def _plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.dim() == 4 and not value.is_meta and value.numel() > 0


def _case(image: Tensor, mask: Tensor) -> tuple:
    """What else than the instance decides how a call goes."""
    kind = image.device.type
    grads = torch.is_grad_enabled(), image.requires_grad, mask.requires_grad, torch.is_inference_mode_enabled()
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    batches = image.shape[0] == mask.shape[0], image.shape[0] == 1, mask.shape[0] == 1
    channels = image.shape[1], min(mask.shape[1], 3)
    return image.device, image.dtype, mask.dtype, cast, *grads, *batches, *channels, *sizes(image, mask)


def _held(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors of an instance: attributes, parameters and buffers, with where they are."""
    for each in module.modules():
        for name, value in vars(each).items():
            inside = value if name in ("_parameters", "_buffers") else {"": value}
            yield from ((name, key, one) for key, one in inside.items() if isinstance(one, Tensor))


def _hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks") and "forward" in name)


def _state(module: nn.Module, tensors: bool) -> tuple:
    """All numbers and words of an instance, and of its process's environment, which copies read weights from; and
    ``tensors`` it has, whose changes show in their versions (of numbers also in what they are).
    """
    found: list[Any] = [repr(_setting(module, name)) for name in ("dilations", "num_iter", "w1", "w2", "w3")]
    found.append(hash(tuple(os.environ.items())))
    for each in module.modules():
        found.append((type(each), each is not module and _hooks(each)))
        for name, value in vars(each).items():
            if isinstance(value, (bool, int, float, str, list, tuple)):
                found.append((name, repr(value)))
            elif isinstance(value, dict) and name not in OF_MODULES:
                found.append((name, *((repr(key), _word(one)) for key, one in value.items())))
    if tensors:  # an address alone may be another's by now
        found += [(*place, WeakIdRef(one), one.requires_grad, *_numbers(one)) for *place, one in _held(module)]
    return tuple(found)


def _word(value: Any) -> str | int:
    return repr(value) if isinstance(value, (bool, int, float, str)) else id(value)


def _numbers(tensor: Tensor) -> tuple:
    """A version, which ``.data`` passes by, and the numbers where reading them costs nothing."""
    few = tensor.numel() <= 4 and tensor.device.type == "cpu"
    return _version(tensor), *(tensor.detach().flatten().tolist() if few else ())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def why_not(found: type) -> str | None:
    """Why a class of one of these names cannot be served at all, or None."""
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        return "not a torch module"
    try:
        takes = needed(found.forward)
    except (TypeError, ValueError):
        return "its signature cannot be read"
    if len(takes) != 2:
        return f"its forward takes {len(takes)} tensors, not an image and a mask"
    return None


def is_ours(found: type) -> bool:
    """Our own classes, and those of PyTorch and the packages beside it."""
    return issubclass(found, (PAR, PAMR)) or (found.__module__ or "").partition(".")[0] in LEFT_ALONE


def every_class(base: type = nn.Module) -> Iterator[type]:
    """All subclasses that exist, those they inherit from first."""
    seen, waiting = set(), [base]
    while waiting:
        found = waiting.pop(0)
        for each in type.__subclasses__(found):
            if each not in seen:
                seen.add(each)
                waiting.append(each)
                yield each
