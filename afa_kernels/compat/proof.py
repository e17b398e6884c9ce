"""What a proof is made of: a small image and mask, both forwards run on them, and how far apart the two are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

AGREEMENT = 1e-4  # of the largest value; a gradient's is ten times that
SIZES = {0: (23, 31), -1: (12, 17), 1: (37, 45)}  # of the small image; of a mask that is smaller or larger


class Unfit(Exception):
    """What no kernel of ours would do in its place."""


def _sign(a: int, b: int) -> int:
    return (a > b) - (a < b)


def sizes(image: Tensor, mask: Tensor) -> tuple[int, int]:
    return tuple(_sign(mask.shape[axis], image.shape[axis]) for axis in (2, 3))


def small_pair(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """An image and a mask like these: the left half in full contrast, the right half nearly flat. The mask is wider
    than the one given, on both sides of 0: a later one may be, and what a copy cuts off there must show.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.rand, generator=generator, device="cpu")
    height, width = SIZES[0]
    values = drawn(min(image.shape[0], 2), image.shape[1], height, width)
    values[..., width // 2 :] = 0.4 + 0.01 * values[..., width // 2 :]
    rows, columns = (SIZES[sign][axis] for axis, sign in enumerate(sizes(image, mask)))
    scores = drawn(min(mask.shape[0], 2), min(mask.shape[1], 3), rows, columns)
    low, high = _range(image)
    most = 2 * max(map(abs, _range(mask)))
    pair = []
    for like, small in ((image, values * (high - low) + low), (mask, (2 * scores - 1) * most)):
        pair.append(small.to(like.device, like.dtype).requires_grad_(like.requires_grad))
    return pair[0], pair[1]


def _range(value: Tensor) -> tuple[float, float]:
    low, high = (float(edge) for edge in torch.aminmax(value.detach()))
    if not math.isfinite(high - low):
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


def _random(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def undisturbed(
    call: Callable[[Tensor, Tensor], Any], image: Tensor, mask: Tensor, learned: list[Tensor]
) -> tuple[list[Tensor | None], float]:
    """As `tried`, of a forward that may do what ours cannot: then it is `Unfit`, and nothing of it is left."""
    device = image.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        drawn = _random(device)
        found = tried(call, image, mask, learned)
        if not all(map(torch.equal, drawn, _random(device))):
            raise Unfit("it draws random numbers")
    return found


def tried(
    call: Callable[[Tensor, Tensor], Any], image: Tensor, mask: Tensor, learned: list[Tensor]
) -> tuple[list[Tensor | None], float]:
    """What comes out, the gradients if there are any, and seconds."""

    def once() -> Tensor:
        given = [value.detach().clone().requires_grad_(value.requires_grad) for value in (image, mask)]
        leaves.append([value for value in given if value.requires_grad])
        out = call(*given)
        if not all(map(torch.equal, given, (image, mask))):
            raise Unfit("it writes into its arguments")
        return out

    leaves: list[list[Tensor]] = []
    out = once()  # the first is not timed
    if not isinstance(out, Tensor):
        raise TypeError(f"a forward gives a tensor, not {type(out).__name__}")
    found: list[Tensor | None] = [out.detach()]
    wanted = [*leaves[-1], *learned]
    if out.requires_grad and wanted:
        probe = torch.linspace(0, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        found += torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True)
    _wait(image.device)
    start = time.perf_counter()
    once()
    _wait(image.device)
    return found, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def apart(got: list[Tensor | None], want: list[Tensor | None]) -> float:
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
        most = float((mine - theirs).abs().max())
        worst = max(worst, most / allowed if allowed > 0 else (0.0 if most == 0 else float("inf")))
        if worst != worst or not bool(theirs.isfinite().all()):
            return float("inf")
    return worst
