"""PAR: weights and all iterations, as a training step calls it. The reference is plain dense tensor code.

On a GPU the native kernels have two plans: "resident" keeps the weights on chip through all iterations, "streaming"
reads them from memory in each. "native" chooses by itself; the other two are made to take one, so that the choice can
be judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import afa_kernels

from ...ops.par import DILATIONS
from ..harness import Case, Unable, compiled, kernels

# (batch, channels, height, width, iterations): training at crop 512 and half resolution, evaluation, large photographs.
SHAPES = [
    (1, 3, 160, 160, 10),
    (1, 21, 320, 320, 10),
    (2, 3, 256, 256, 10),
    (8, 3, 256, 256, 10),
    (1, 21, 512, 512, 5),
    (1, 3, 1024, 2048, 20),
]
QUICK = SHAPES[:3]
TAPS = 8 * len(DILATIONS)


PLANS = ("resident", "streaming")


def with_plan(plan: str, call: Callable[[], Tensor]) -> Tensor:
    """The call with this plan, whatever the kernels would choose; `Unable` where the plan cannot take the case."""
    before = os.environ.get("AFA_PLAN")
    os.environ["AFA_PLAN"] = plan
    try:
        return call()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "CUDA" in str(error):  # no memory, or a kernel that failed
            raise
        raise Unable(str(error)) from error
    finally:
        if before is None:
            del os.environ["AFA_PLAN"]
        else:
            os.environ["AFA_PLAN"] = before


def case(shape: tuple[int, ...], device: str, compiling: bool) -> Case:
    batch, channels, height, width, iterations = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator).to(device)
    masks = torch.rand(batch, channels, height, width, generator=generator).to(device)
    call = partial(afa_kernels.par, images, masks, num_iter=iterations)
    providers = {"reference": partial(call, backend="reference")}
    if compiling:
        providers["torch.compile"] = compiled(providers["reference"])
    ours = kernels("par", device)
    providers |= {name: partial(call, backend=name) for name in ours}
    if device == "cuda" and "native" in ours:
        providers |= {f"native {plan}": partial(with_plan, plan, providers["native"]) for plan in PLANS}
    pixels = batch * height * width
    return Case(
        f"{batch}x{channels}x{height}x{width}, {iterations} iterations",
        providers,
        # Images and masks in, masks out: with the weights on chip nothing else need move.
        bytes=4.0 * pixels * (3 + 2 * channels),
        # A weight costs about 30 operations (deviation, exponential, softmax), then two a channel and step.
        operations=pixels * TAPS * (30.0 + 2.0 * channels * iterations),
    )


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    return [case(shape, device, compiling) for shape in (QUICK if quick else SHAPES)]
