"""Affinity, its losses and the random walk, forward and backward, on inputs nobody chose, against the reference; and
the sizes their entry points compute. See `fuzzing`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE
from support.fuzzing import DTYPES, EMULATED, EXTREMES, Draw, agree, backends, fuzz, running, without_limit

import afa_kernels
from afa_kernels.core import native_module
from afa_kernels.ops.affinity import reference as affinity_reference

pytestmark = [without_limit]

POSITIVE = [value for value in EXTREMES if not value < 0]
LIMIT = torch.finfo(torch.float32).max / 16


def gradients(call, leaves: list[torch.Tensor], grad: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``call`` of fresh leaves; and their gradients where there is a ``grad``."""
    leaves = [leaf.detach().clone().requires_grad_(grad is not None) for leaf in leaves]
    out = call(*leaves)
    return out.detach(), [] if grad is None else list(torch.autograd.grad(out, leaves, grad, materialize_grads=True))


# --- the random walk --------------------------------------------------------------------------------------------------


def walk_sizes(affinity, cams, grad, radius, power, steps, eps, present):
    """In float64: what the largest sum on the way comes to, and the sizes of the gradients, nothing cancelling.

    An affinity of 1e30 makes weights of that size too, for it is not its own column that its pixel divides by.
    """
    _, inside = affinity_reference.window_neighbours(*affinity.shape[2:], radius, affinity.device)
    affinity = torch.where(inside.view(affinity.shape[1:]), affinity.double(), 0)
    powered = (affinity**power).requires_grad_()
    column = F.fold(powered.detach().flatten(2), affinity.shape[2:], kernel_size=2 * radius + 1, padding=radius) + eps
    column.requires_grad_()
    cams = cams.double().abs().requires_grad_()
    offsets, weights, out, most = affinity_reference.window_offsets(radius), powered / column, cams, [powered.max()]
    for _ in range(steps):  # divided by the columns' sums before or after
        most.append(powered.max() * out.max())
        out = afa_kernels.diffuse(weights, out, offsets, 1, "zero", present, backend="reference")
        most.append((out * column).max())
    reach = float(torch.stack(most).detach().nan_to_num(0, math.inf).max())
    if grad is None:
        return reach, []
    leaves = powered, column, cams
    by_powered, by_column, by_cams = torch.autograd.grad(out, leaves, grad.double(), materialize_grads=True)
    others = F.unfold(by_column.abs(), 2 * radius + 1, padding=radius).view_as(affinity)
    return reach, [power * affinity ** (power - 1) * (by_powered + others), by_cams]


@pytest.mark.parametrize("backend", backends("random_walk"))
@fuzz
@given(st.data())
def test_random_walk(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 8), draw.integer("h", 1, 14), draw.integer("w", 1, 20)
    batch, channels, taps = draw.integer("B", 1, 2), draw.integer("C", 1, 6), (2 * radius + 1) ** 2
    affinity = draw.tensor(
        "affinity", batch, taps, height, width, dtype=draw.choice("affinity", DTYPES), extremes=[*POSITIVE, 1.0]
    )
    cams = draw.tensor("cams", batch, channels, height, width, dtype=draw.choice("cams", DTYPES))
    power, steps, eps = (
        draw.choice("power", [1.0, 2.0, 2.5]),
        draw.integer("num_steps", 0, 3),
        draw.choice("eps", [0.1, 1e-4]),
    )
    present = draw.class_mask(batch, channels)
    grad = draw.random(*cams.shape).to(DEVICE, cams.dtype) if draw.flag("backward") else None

    def run(affinity, cams):
        return afa_kernels.random_walk(affinity, cams, radius, power, steps, eps, class_mask=present)

    with running(backend, draw.generator):
        got, got_grads = gradients(run, [affinity, cams], grad)
    with afa_kernels.use_backend("reference"):
        want, want_grads = gradients(run, [affinity, cams], grad)
        bound = run(affinity.double(), cams.double().abs())
    reach, sizes = walk_sizes(affinity, cams, grad, radius, power, steps, eps, present)
    agree(got, want, bound, 5e-5, reach)
    if cams.isfinite().all() and (affinity <= 1).all() and reach < LIMIT:
        for mine, theirs, size in zip(got_grads, want_grads, sizes):
            agree(mine, theirs, size, 5e-5, reach)


# --- affinity ---------------------------------------------------------------------------------------------------------


class Attention:
    """Query, key and head on a grid, or score maps in place of queries and keys."""

    def __init__(self, draw: Draw, backend: str, maps: bool = False) -> None:
        # Smaller where threads are emulated, but still of several tiles of 8 x 8 pixels.
        few = backend in EMULATED.values()
        self.radius, self.height, self.width = (
            draw.integer("radius", 0, 5),
            draw.integer("h", 1, 7 if maps else 9),
            draw.integer("w", 1, 9 if maps or few else 12),
        )
        batch, heads, count = (
            draw.integer("B", 1, 2),
            draw.integer("heads", 1, 2 if few else 5),
            self.height * self.width,
        )
        dtype = draw.choice("dtype", DTYPES)
        depth = count if maps else draw.choice("d", [1, 3, 8, 16, 33])
        names = ["maps"] if maps else ["query", "key"]
        extremes = [*EXTREMES, 1e3]
        scores = [draw.tensor(n, batch, heads, count, depth, dtype=dtype, extremes=extremes, low=-1) for n in names]
        self.tensors = [*scores, *((draw.random(size) - 0.5).to(DEVICE, dtype) for size in (heads, 1))]
        self.grad = draw.random(batch, (2 * self.radius + 1) ** 2, self.height, self.width).to(DEVICE, dtype)
        self.grid = self.height, self.width, self.radius

    def sums(self, *tensors: torch.Tensor) -> torch.Tensor:
        """What the sigmoids take, as a window, without their signs: sums in which nothing cancels."""
        *scores, weight, bias = tensors
        maps = scores[0] if len(scores) == 1 else scores[0] @ scores[1].transpose(2, 3)
        dense = torch.einsum("bhij,h->bij", maps + maps.transpose(2, 3), weight) + bias
        return affinity_reference.dense_to_window(dense, *self.grid)

    def sizes(self, slopes: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """How large those sums are, and the gradients' own, for ``slopes`` of the sigmoids times the output's
        gradient; by default as large as a sigmoid errs, which is as its argument does.
        """
        leaves = [tensor.double().abs().requires_grad_() for tensor in self.tensors]
        sums = self.sums(*leaves)
        slopes = self.grad.double() * (1 + sums.detach()) if slopes is None else slopes
        return 1 + sums.detach(), list(torch.autograd.grad((slopes * sums).sum(), leaves))


def check_affinity(backend: str, draw: Draw, inputs: Attention, call) -> None:
    """Output and gradients; what is NaN or overflows has no gradient that must agree."""
    with running(backend, draw.generator):
        got, got_grads = gradients(call, inputs.tensors, inputs.grad)
    with afa_kernels.use_backend("reference"):
        want, want_grads = gradients(call, inputs.tensors, inputs.grad)
    reach, sizes = inputs.sizes()
    agree(got, want, reach.clamp_max(1e6), 2e-6, reach)
    if all(tensor.isfinite().all() for tensor in inputs.tensors) and float(reach.max()) < 1e6:
        for mine, theirs, size in zip(got_grads, want_grads, sizes):
            agree(mine, theirs, size, 4e-6)


@pytest.mark.parametrize("backend", backends("window_affinity"))
@fuzz
@given(st.data())
def test_window_affinity(backend, data):
    draw = Draw(data)
    inputs = Attention(draw, backend)
    check_affinity(backend, draw, inputs, lambda *tensors: afa_kernels.window_affinity(*tensors, *inputs.grid))


@pytest.mark.parametrize("backend", backends("affinity_from_maps"))
@fuzz
@given(st.data())
def test_affinity_from_maps(backend, data):
    draw = Draw(data)
    inputs = Attention(draw, backend, maps=True)
    check_affinity(backend, draw, inputs, lambda *tensors: afa_kernels.affinity_from_maps(*tensors, *inputs.grid))


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_factors(labels: torch.Tensor, window: torch.Tensor, radius: int) -> torch.Tensor:
    """How much each pair of a window counts in the loss."""
    leaf = torch.zeros_like(window, dtype=torch.float64).requires_grad_()
    loss, *_ = afa_kernels.affinity_loss(leaf, labels, radius, backend="reference")
    return torch.autograd.grad(loss, leaf)[0].abs()


@pytest.mark.parametrize("backend", backends("attention_affinity_loss"))
@fuzz
@given(st.data())
def test_attention_affinity_loss(backend, data):
    draw = Draw(data)
    inputs = Attention(draw, backend)
    labels = draw.labels(inputs.tensors[0].shape[0], inputs.height, inputs.width)

    def run():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
        loss, *counts = afa_kernels.attention_affinity_loss(*leaves, labels, inputs.radius)
        loss.backward()
        return loss.detach(), [int(count) for count in counts], [leaf.grad for leaf in leaves]

    with running(backend, draw.generator):
        got, got_counts, got_grads = run()
    with afa_kernels.use_backend("reference"):
        want, want_counts, want_grads = run()
        window = afa_kernels.window_affinity(*(tensor.double() for tensor in inputs.tensors), *inputs.grid)
    assert got_counts == want_counts
    factors = loss_factors(labels, window, inputs.radius)
    reach, errors = inputs.sizes(factors * inputs.sizes()[0])
    size = torch.where(factors > 0, factors * reach.clamp_max(1e6), 0).sum()
    agree(got, want, 1 + size, 1e-5, reach.nan_to_num(0, math.inf).max())
    if not float(reach.nan_to_num(math.inf, math.inf).max()) < 1e6:
        return
    _, sizes = inputs.sizes(factors * window * (1 - window))
    for mine, theirs, size, error in zip(got_grads, want_grads, sizes, errors):
        # Tensor cores take gradients of scores in half precision, a tile's with one scale: small ones lose digits.
        coarse = 0 if mine.dtype == torch.float32 else 1e-6 * float(size.max())
        agree(mine, theirs, size, 2e-5, slack=4e-6 * error + coarse)


@pytest.mark.parametrize("backend", backends("affinity_loss"))
@fuzz
@given(st.data())
def test_affinity_loss(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 6), draw.integer("h", 1, 12), draw.integer("w", 1, 20)
    shape = draw.integer("B", 1, 3), (2 * radius + 1) ** 2, height, width
    affinity = draw.tensor("affinity", *shape, dtype=draw.choice("dtype", DTYPES), extremes=[*POSITIVE, 1.0])
    labels, grad = draw.labels(shape[0], height, width), draw.random(1).to(DEVICE)[0]

    def run():
        leaf = affinity.detach().clone().requires_grad_()
        loss, *counts = afa_kernels.affinity_loss(leaf, labels, radius)
        loss.backward(grad)
        return loss.detach(), [int(count) for count in counts], leaf.grad

    with running(backend, draw.generator):
        got, got_counts, got_grad = run()
    with afa_kernels.use_backend("reference"):
        want, want_counts, want_grad = run()
    assert got_counts == want_counts
    factors = loss_factors(labels, affinity, radius)
    size = torch.where(factors > 0, factors * affinity.double(), 0).sum()
    agree(got, want, 1 + size, 1e-5)
    agree(got_grad, want_grad, want_grad.abs(), 1e-5)


# --- the compiled entry points ----------------------------------------------------------------------------------------


def nowhere(*shape: int) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """A contiguous float32 tensor as the entry points take it, at no address."""
    return 0, 0, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@pytest.mark.skipif("native" not in backends("random_walk") or DEVICE != "cpu", reason="no native backend here")
@fuzz
@given(st.data())
def test_workspace_sizes_are_64_bit(data):
    """Sizes whose products pass 2^31 and 2^32: nothing wraps, and more pixels or channels never need less."""
    draw = Draw(data)
    height, width = draw.integer("h", 1, 40_000), draw.integer("w", 1, 60_000)
    heads, depth, radius = draw.integer("heads", 1, 64), draw.integer("d", 1, 64), draw.integer("radius", 0, 16)
    channels, power = draw.integer("C", 1, 200), draw.choice("power", [1.0, 2.0, 2.5])
    native = native_module.native

    def sizes(height: int, channels: int) -> list[int]:
        pixels, side = height * width, 2 * radius + 1
        attention, maps = nowhere(1, heads, pixels, depth), nowhere(1, 1, pixels, pixels)
        window, cams = nowhere(1, side**2, height, width), nowhere(1, channels, height, width)
        grid = (height, width, radius), 2
        common, of_maps = ([0.0] * (heads + 1), *grid), ([0.0] * 2, *grid)
        return [
            native.attention_cpu_workspace(attention, attention, *common),
            native.attention_backward_cpu_workspace(attention, attention, *common),
            native.affinity_from_maps_cpu_workspace(maps, *of_maps),
            native.affinity_from_maps_backward_cpu_workspace(maps, *of_maps),
            native.random_walk_cpu_workspace(window, cams, radius, power, 2),
            native.random_walk_affinity_gradient_cpu_workspace(window, cams, radius, 2),
        ]

    before, pixels = sizes(height, channels), height * width
    # Packed queries and keys, the score maps a tile at a time, the cams or states and gradients twice.
    packed, twice = 4 * 2 * pixels * heads * depth, 4 * 2 * pixels * channels
    assert all(size >= floor for size, floor in zip(before, [packed, packed, 1, 1, twice, twice]))
    for after in (sizes(height + 1, channels), sizes(height, channels + 1)):
        assert all(more >= less for more, less in zip(after, before))
