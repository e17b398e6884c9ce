"""Random-walk propagation: class activation spread along the affinity (AFA, Eq. 7 and 8).

    D_jj = sum_i A_ij^p + eps,   T = D^-1 A^p,   M' = T M        repeated num_steps times

over the window [B, (2r+1)^2, h, w] of `window_affinity`: the weights of T are normalised once and the walk is
the diffusion that PAR uses, with zero border. Repeated steps are repeated diffusions; no power of a matrix is
ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backends, random_walk_reference
from ._checks import FLOATS, check_class_mask, check_float, check_int, check_same_device, check_tensor
from .affinity import INTEGERS, check_window

# --- checks -------------------------------------------------------------------------------------------------


def _check(affinity: Tensor, cams: Tensor, radius: int, power: float, eps: float) -> tuple[int, float, float]:
    radius = check_int(radius, "radius", 0)
    check_window(affinity, radius)
    batch, _, height, width = affinity.shape
    check_tensor(cams, "cams", ("B", "C", "h", "w"), FLOATS, B=batch, h=height, w=width)
    check_same_device(affinity, "affinity", cams=cams)
    eps = check_float(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return radius, check_float(power, "power", positive=True), eps


def random_walk(
    affinity: Tensor,
    cams: Tensor,
    radius: int,
    power: float = 2,
    num_steps: int = 1,
    eps: float = 0.1,
    *,
    class_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Spread class activation maps along the affinity (AFA, Eq. 7 and 8).

    Args:
        affinity: [B, (2 * radius + 1)^2, h, w] at least 0, as from `window_affinity`; what a tap outside the
            image holds plays no part. float32, float16 or bfloat16 (float64 in the reference path).
        cams: [B, C, h, w], any range, likewise; may differ in dtype from affinity.
        radius: of the window, at least 0.
        power: p, positive; higher ignores faint affinities.
        num_steps: how often T is applied, at least 0; 0 returns a copy of cams.
        eps: added to the sums that normalise, at least 0; pixels without affinity then get 0 rather than NaN.
        class_mask: [B, C] bool; channels that are False cost nothing and are returned as 0.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, C, h, w] in the dtype of cams. Weights and sums are float32.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.
    """
    radius, power, eps = _check(affinity, cams, radius, power, eps)
    num_steps = check_int(num_steps, "num_steps", 0)
    check_class_mask(class_mask, cams, "cams")
    _backends.choose("random_walk", backend, affinity, cams)
    with torch.autocast(cams.device.type, enabled=False):
        return random_walk_reference.random_walk(affinity, cams, radius, power, num_steps, eps, class_mask)


def random_walk_with_background(
    affinity: Tensor,
    cams: Tensor,
    cls_labels: Tensor,
    score: float | Sequence[float],
    radius: int,
    power: float = 2,
    eps: float = 0.1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Random walk of class probabilities with a background channel, absent classes left out (AFA, Sec. 3.4).

    The background score becomes a channel before the classes, a softmax runs over background and present
    classes, and the result takes one step of `random_walk`.

    Args:
        affinity, radius, power, eps: as in `random_walk`.
        cams: [B, K, h, w] class activation, in 0..1 where the score is to mean what it does in the paper.
        cls_labels: [B, K], above 0 where the image has the class; bool, integers or floats.
        score: the background score, or several of them, which share the walk's weights and go through it
            together.
        backend: as in `random_walk`.

    Returns:
        [B, K + 1, h, w] in the dtype of cams, the background first, absent classes 0; for a sequence of S
        scores [S, B, K + 1, h, w].

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.
    """
    radius, power, eps = _check(affinity, cams, radius, power, eps)
    batch, classes = cams.shape[:2]
    check_tensor(cls_labels, "cls_labels", ("B", "K"), (torch.bool, *INTEGERS, *FLOATS), B=batch, K=classes)
    check_same_device(cams, "cams", cls_labels=cls_labels)
    several = isinstance(score, Sequence) and not isinstance(score, str)
    scores = [check_float(value, "score") for value in (score if several else [score])]
    if not scores:
        raise ValueError("score must be a number or a sequence of at least one number, got an empty sequence")
    probabilities, present = random_walk_reference.background_softmax(cams, cls_labels, scores)
    walked = random_walk(
        affinity,
        probabilities.flatten(1, 2),
        radius,
        power,
        1,
        eps,
        class_mask=present.flatten(1, 2),
        backend=backend,
    )
    walked = walked.unflatten(1, (len(scores), classes + 1)).transpose(0, 1).to(cams.dtype)
    return walked if several else walked[0]


# --- registration -------------------------------------------------------------------------------------------

_backends.register("random_walk")
