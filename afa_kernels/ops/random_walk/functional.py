"""Random-walk propagation: class activation spread along the affinity (AFA, Eq. 7 and 8).

    D_jj = sum_i A_ij^p + eps,   T = D^-1 A^p,   M' = T M        repeated num_steps times

over the window [B, (2r+1)^2, h, w] of `window_affinity`: the weights of T are normalised once and the walk is
the diffusion that PAR uses, with zero border. Repeated steps are repeated diffusions; no power of a matrix is
ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import backends
from ...core.checks import (
    FARTHEST,
    FLOATS,
    INTEGERS,
    MOST_STEPS,
    check_class_mask,
    check_float,
    check_int,
    check_same_device,
    check_tensor,
    check_window,
)
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference

# --- checks -------------------------------------------------------------------------------------------------


def _check(affinity: Tensor, cams: Tensor, radius: int, power: float, eps: float) -> tuple[int, float, float]:
    radius = check_int(radius, "radius", 0, FARTHEST)
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

    Examples:
        >>> import torch
        >>> from afa_kernels import random_walk
        >>> cams = torch.tensor([[[[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]]])
        >>> walked = random_walk(torch.ones(1, 9, 3, 3), cams, radius=1, eps=0)  # all neighbours are alike
        >>> round(walked[0, 0, 1, 1].item(), 4), round(walked[0, 0, 0, 0].item(), 4)  # means of nine pixels and of four
        (0.1111, 0.25)
    """
    radius, power, eps = _check(affinity, cams, radius, power, eps)
    num_steps = check_int(num_steps, "num_steps", 0, MOST_STEPS)
    check_class_mask(class_mask, cams, "cams")
    chosen = backends.choose("random_walk", backend, affinity, cams)
    inputs = affinity, cams, radius, power, num_steps, eps, class_mask
    if chosen == "reference":
        with no_autocast(cams.device):
            return reference.random_walk(*inputs)
    return _random_walk(*inputs, False, chosen)


def random_walk_with_background(
    affinity: Tensor,
    cams: Tensor,
    cls_labels: Tensor,
    score: float | Sequence[float] | Tensor,
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
        score: the background score, or several of them (a sequence, or an array or tensor of one axis), which share
            the walk's weights and go through it together. Numbers: a tensor that asks for a gradient is refused.
        backend: as in `random_walk`.

    Returns:
        [B, K + 1, h, w] in the dtype of cams, the background first, absent classes 0; for a sequence of S
        scores [S, B, K + 1, h, w].

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import random_walk_with_background
        >>> affinity, cams, present = torch.rand(1, 289, 20, 20), torch.rand(1, 20, 20, 20), torch.rand(1, 20) > 0.8
        >>> random_walk_with_background(affinity, cams, present, score=[0.35, 0.55], radius=8).shape
        torch.Size([2, 1, 21, 20, 20])
    """
    radius, power, eps = _check(affinity, cams, radius, power, eps)
    batch, classes = cams.shape[:2]
    check_tensor(cls_labels, "cls_labels", ("B", "K"), (torch.bool, *INTEGERS, *FLOATS), B=batch, K=classes)
    check_same_device(cams, "cams", cls_labels=cls_labels)
    scores, several = _check_score(score)
    probabilities, present = _with_background(cams, cls_labels, scores)
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


def _check_score(score: float | Sequence[float] | Tensor) -> tuple[list[float], bool]:
    """The scores, and whether they came as several."""
    if isinstance(score, Tensor) and score.requires_grad:
        raise ValueError("score must be a number or several, which have no gradient: score.detach()")
    values = score.tolist() if isinstance(score, Tensor) or hasattr(score, "__array__") else score
    several = isinstance(values, Sequence) and not isinstance(values, str)
    scores = [check_float(value, "score") for value in (values if several else [values])]
    if not scores:
        raise ValueError("score must be a number or a sequence of at least one number, got an empty sequence")
    return scores, several


def _with_background(
    cams: Tensor, cls_labels: Tensor, scores: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, S, K+1, h, w] over background and present classes; who is present, [B, S, K+1]."""
    batch, classes, height, width = cams.shape
    cams = cams.to(torch.promote_types(cams.dtype, torch.float32))
    background = torch.stack([torch.full_like(cams[:, 0], float(score)) for score in scores], dim=1)
    logits = torch.cat([background[:, :, None], cams[:, None].expand(-1, len(scores), -1, -1, -1)], dim=2)
    present = F.pad(cls_labels > 0, (1, 0), value=True)
    absent = ~present[:, None, :, None, None]
    probabilities = torch.softmax(logits.masked_fill(absent, -torch.inf), dim=2)
    return probabilities, present[:, None].expand(-1, len(scores), -1)


# --- forward and its adjoint ------------------------------------------------------------------------------


@operator("random_walk")
def _random_walk(
    affinity: Tensor,
    cams: Tensor,
    radius: int,
    power: float,
    num_steps: int,
    eps: float,
    class_mask: Tensor | None,
    transpose: bool,
    backend: str,
) -> Tensor:
    inputs = affinity, cams, radius, power, num_steps, eps, class_mask, transpose
    return implementation(__package__, backend).random_walk(*inputs)


@_random_walk.register_fake
def _(affinity, cams, radius, power, num_steps, eps, class_mask, transpose, backend):
    return torch.empty(cams.shape, dtype=cams.dtype, device=cams.device)


# --- backward ---------------------------------------------------------------------------------------------


@operator("random_walk_affinity_gradient")
def _affinity_gradient(
    affinity: Tensor,
    start: Tensor,
    end: Tensor,
    radius: int,
    power: float,
    num_steps: int,
    eps: float,
    class_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of <end, T^num_steps start>: step s sees T^(s-1) start and hands on T'^(num_steps-s) end."""
    if num_steps == 0:
        return torch.zeros(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    kernels = implementation(__package__, backend)
    states, grads = [start.float()], [end.float()]
    if class_mask is not None:
        states[0] = torch.where(class_mask[:, :, None, None], states[0], 0)
        grads[0] = torch.where(class_mask[:, :, None, None], grads[0], 0)
    for _ in range(num_steps - 1):
        states.append(kernels.random_walk(affinity, states[-1], radius, power, 1, eps, class_mask, False))
        grads.append(kernels.random_walk(affinity, grads[-1], radius, power, 1, eps, class_mask, True))
    sides = torch.cat(states, dim=1), torch.cat(grads[::-1], dim=1)
    return kernels.random_walk_affinity_gradient(affinity, *sides, radius, power, eps)


@_affinity_gradient.register_fake
def _(affinity, start, end, radius, power, num_steps, eps, class_mask, backend):
    return torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)


def _save(ctx, inputs, output):
    affinity, cams, *options, class_mask, transpose, backend = inputs
    ctx.save_for_backward(affinity, cams if ctx.needs_input_grad[0] else None, class_mask)
    ctx.options = options, transpose, backend, cams.dtype


def _backward(ctx, grad):
    affinity, cams, class_mask = ctx.saved_tensors
    options, transpose, backend, dtype = ctx.options
    grad_affinity = grad_cams = None
    if ctx.needs_input_grad[1]:
        inputs = affinity, grad, *options, class_mask, not transpose, backend
        grad_cams = _random_walk(*inputs).to(dtype)
    if ctx.needs_input_grad[0]:
        # <grad, T cams> is also <T' grad, cams>: the adjoint's affinity has the same gradient, both exchanged.
        sides = (grad, cams) if transpose else (cams, grad)
        grad_affinity = _affinity_gradient(affinity, *sides, *options, class_mask, backend)
    return grad_affinity, grad_cams, *[None] * 7


# --- registration -----------------------------------------------------------------------------------------

_random_walk.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    tensors = {"affinity": draw(2, 49, 9, 11), "cams": draw(2, 3, 9, 11)}
    steps = {"radius": 3, "num_steps": 2, "class_mask": draw(2, 3) > 0.3}
    cubed = {"radius": 3, "power": 3}
    return [Sample(random_walk, tensors, options, ("affinity", "cams")) for options in (steps, cubed)]


backends.register("random_walk", _samples)
