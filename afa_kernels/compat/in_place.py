"""Another repository's PAR and PAMR, served by our kernels where it is proven that they give the same.

The class stays what it is; its ``forward`` is replaced, so that aliases, registries, subclasses and instances that
exist already follow. Before an instance is first called in some way (by dtypes, numbers of channels, sizes, autocast,
gradients) its own forward and ours run on a small image with a low-contrast half. Ours serves such calls where the two
agree; else its own does, as before, and that is said once. What is compiled or traced keeps its own.
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
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.par import PAMR, PAR, pamr, par

NAMES = ("PAR", "PAMR")
AGREEMENT = 1e-4  # of the largest value; a gradient's is ten times that
SIZES = {0: (23, 31), -1: (12, 17), 1: (37, 45)}  # of the small image; of a mask that is smaller or larger
MOST_CASES = 64  # an instance that is another one at every call is not worth a proof each
OURS = ("torch", "torchvision", "timm", "afa_kernels", "afa_model")

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
        self._verdicts: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
        self._of_replicas: dict = {}  # those of DataParallel live for one call

    @property
    def name(self) -> str:
        """Module and name of the class."""
        return f"{self.owner.__module__}.{self.owner.__qualname__}"

    def begin(self) -> None:
        """Replace the forward."""

        @wraps(self.theirs)
        def forward(module, *arguments, **keywords):
            return self._forward(module, arguments, keywords)

        forward.afa_served = self
        self.owner.forward = forward

    def undo(self) -> None:
        """Put its own forward back."""
        if getattr(vars(self.owner).get("forward"), "afa_served", None) is not self:
            return
        if self._inherited:
            del self.owner.forward
        else:
            self.owner.forward = self.theirs

    def _forward(self, module: nn.Module, arguments: tuple, keywords: dict) -> Any:
        under_way = getattr(_proof, "under_way", False)
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
        pair = _small(image, mask)
        try:
            want, spent = _tried(partial(self.theirs, module), *pair)
        except Exception as error:
            return Verdict(None, f"its own forward fails on a small image ({type(error).__name__}: {error})")
        nearest, last = float("inf"), "its num_iter and dilations are not to be found"
        for label, call in candidates(module):
            try:
                got, ours = _tried(call, *pair)
            except (TypeError, ValueError) as error:
                last = f"{label} refuses the call ({error})"
                continue
            apart = _apart(got, want)
            if apart <= 1:
                return Verdict(call, ratio=spent / ours)
            if apart < nearest:
                nearest, last = apart, f"it differs from {label} by {apart * AGREEMENT:.2g} of the largest value"
            elif nearest == float("inf"):
                last = f"it gives another shape, dtype or gradient than {label}"
        return Verdict(None, last)

    def _keep(self, reason: str) -> None:
        self.kept += 1
        if reason not in self.said:
            self.said.add(reason)
            print(f"afa_kernels.compat: {self.name} keeps its own forward: {reason}", file=sys.stderr, flush=True)


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


def _sign(a: int, b: int) -> int:
    return (a > b) - (a < b)


def _sizes(image: Tensor, mask: Tensor) -> tuple[int, int]:
    return tuple(_sign(mask.shape[axis], image.shape[axis]) for axis in (2, 3))


def _case(image: Tensor, mask: Tensor) -> tuple:
    """What else than the instance decides how a call goes."""
    kind = image.device.type
    grads = torch.is_grad_enabled(), image.requires_grad, mask.requires_grad, torch.is_inference_mode_enabled()
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    batches = image.shape[0] == mask.shape[0], image.shape[0] == 1, mask.shape[0] == 1
    channels = image.shape[1], min(mask.shape[1], 3)
    return image.device, image.dtype, mask.dtype, cast, *grads, *batches, *channels, *_sizes(image, mask)


def _state(module: nn.Module, tensors: bool) -> tuple:
    """All numbers and words of an instance, and of its process's environment, which copies read weights from; and
    ``tensors`` it has, whose changes show in their versions.
    """
    found: list[Any] = [repr(_setting(module, name)) for name in ("dilations", "num_iter", "w1", "w2", "w3")]
    found.append(hash(tuple(os.environ.items())))
    for each in module.modules():
        for name, value in vars(each).items():
            if isinstance(value, (bool, int, float, str, list, tuple)):
                found.append((name, repr(value)))
            elif tensors and isinstance(value, Tensor):
                found.append((name, id(value), _version(value)))
            elif tensors and name in ("_parameters", "_buffers"):
                found += [(name, key, id(one), _version(one)) for key, one in value.items() if one is not None]
    return tuple(found)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _small(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """An image and a mask like these: the left half in full contrast, the right half nearly flat."""
    generator = torch.Generator().manual_seed(0)
    height, width = SIZES[0]
    values = torch.rand(min(image.shape[0], 2), image.shape[1], height, width, generator=generator)
    values[..., width // 2 :] = 0.4 + 0.01 * values[..., width // 2 :]
    rows, columns = (SIZES[sign][axis] for axis, sign in enumerate(_sizes(image, mask)))
    scores = torch.rand(min(mask.shape[0], 2), min(mask.shape[1], 3), rows, columns, generator=generator)
    pair = []
    for like, small in ((image, values), (mask, scores)):
        low, high = (edge.float().cpu() for edge in torch.aminmax(like.detach()))
        small = small * (high - low if high > low else 1.0) + low
        pair.append(small.to(like.device, like.dtype).requires_grad_(like.requires_grad))
    return pair[0], pair[1]


def _tried(call: Callable[[Tensor, Tensor], Any], image: Tensor, mask: Tensor) -> tuple[list[Tensor | None], float]:
    """What comes out, the gradients if there are any, and seconds."""

    def once() -> Tensor:
        given = [value.detach().clone().requires_grad_(value.requires_grad) for value in (image, mask)]
        leaves.append([value for value in given if value.requires_grad])
        return call(*given)

    leaves: list[list[Tensor]] = []
    out = once()  # the first is not timed
    if not isinstance(out, Tensor):
        raise TypeError(f"a forward gives a tensor, not {type(out).__name__}")
    found: list[Tensor | None] = [out.detach()]
    if out.requires_grad:
        probe = torch.linspace(0, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        found += torch.autograd.grad((out * probe).sum(), leaves[-1], allow_unused=True)
    _wait(image.device)
    start = time.perf_counter()
    once()
    _wait(image.device)
    return found, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apart(got: list[Tensor | None], want: list[Tensor | None]) -> float:
    """Largest difference over what is allowed; infinite where dtypes, shapes or what has a gradient differ."""
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for index, (mine, theirs) in enumerate(zip(got, want)):
        if mine is None or theirs is None:
            if mine is not theirs:
                return float("inf")
            continue
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return float("inf")
        mine, theirs = mine.double(), theirs.double()
        allowed = AGREEMENT * (10 if index else 1) * float(theirs.abs().max())
        apart = float((mine - theirs).abs().max())
        worst = max(worst, apart / allowed if allowed > 0 else (0.0 if apart == 0 else float("inf")))
        if worst != worst or not bool(theirs.isfinite().all()):
            return float("inf")
    return worst


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
    return issubclass(found, (PAR, PAMR)) or (found.__module__ or "").partition(".")[0] in OURS


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
