"""Diffusion, PAR and PAMR on inputs nobody chose: shapes, strides, dtypes, taps and extreme values, against the
reference; and the sizes their entry points compute. See `fuzzing`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE, available
from support.cuda_emulator import build
from support.fuzzing import DTYPES, Draw, agree, backends, fuzz, running, without_limit

import afa_kernels
from afa_kernels.core import native_module
from afa_kernels.ops.diffusion.reference import shifted
from afa_kernels.ops.par.reference import tap_offsets

pytestmark = [without_limit]

IMAGE_EXTREMES = [0.0, 1.0, 1e-30, 1e15, 1e30, math.nan, math.inf]


@pytest.mark.parametrize("backend", backends("diffuse"))
@fuzz
@given(st.data())
def test_diffuse(backend, data):
    draw = Draw(data)
    shape = draw.masks(backend, 20)
    taps = draw.choice("T", [1, 2, 3, 8, 9, 48, 66])
    batch, channels, height, width = shape
    weights = draw.tensor("weights", batch, taps, height, width, dtype=draw.choice("weights", DTYPES), low=-1)
    masks = draw.tensor("masks", *shape, dtype=draw.choice("masks", DTYPES), low=-1)
    present, border = draw.class_mask(batch, channels), draw.choice("border", ["replicate", "zero"])
    offsets, num_iter = draw.offsets(taps), draw.integer("num_iter", 0, 3)
    grad = draw.random(*shape).to(DEVICE, masks.dtype)

    def run(weights, masks, grad):
        leaf = masks.detach().clone().requires_grad_()
        out = afa_kernels.diffuse(weights, leaf, offsets, num_iter, border, present)
        out.backward(grad)
        return out.detach(), leaf.grad

    with running(backend, draw.generator):
        got = run(weights, masks, grad)
    with afa_kernels.use_backend("reference"):
        want = run(weights, masks, grad)
        bound = run(weights.double().abs(), masks.double().abs(), grad.double())
    for pair in zip(got, want, bound):
        agree(*pair, 1e-5)


def doubt(operator, images: torch.Tensor, dilations: list[int]) -> torch.Tensor:
    """What rounding may do to a pixel's weights, [B, taps, H, W] or [B, 1, H, W]: they err as kappa does.

    A neighbourhood that is as good as constant, but for the pixel, makes kappas of 1e16, and which of them is the
    largest is their rounding's choice: that of neighbours of different colours, for the kappas of equal ones are equal
    whatever their size. PAMR's stay small: the pixel has its part in sigma.
    """
    if operator in (afa_kernels.pamr, afa_kernels.pamr_weights):
        return torch.zeros(images.shape[0], 1, *images.shape[2:])
    pixels = images.double()
    neighbours = shifted(pixels, tap_offsets(dilations))
    sigma = neighbours.std(dim=2, keepdim=True)
    kappa = -(((neighbours - pixels.unsqueeze(2)) / (sigma + 1e-8) / 0.3) ** 2).mean(dim=1)
    error = 5e-7 * kappa.abs().amax(dim=1)  # [B, H, W]
    if error.nan_to_num(1, 1).max() < 1e-5:
        return error.nan_to_num(0, 1)[:, None]
    doubts = []
    for tap in range(kappa.shape[1]):
        alike = (neighbours == neighbours[:, :, tap : tap + 1]).all(dim=1)
        together = torch.where(alike, kappa, -math.inf).logsumexp(dim=1)
        others = torch.where(alike, -math.inf, kappa).logsumexp(dim=1)
        odds = together - others  # of this colour against all others; infinite where there is none
        doubts.append(torch.sigmoid(odds + 2 * error) - torch.sigmoid(odds - 2 * error))
    # Kappas past float32 are NaN's matter; past its squares anything may be.
    overflown = ~(kappa.abs().amax(dim=1, keepdim=True) < 1e37)
    doubts = torch.stack(doubts, dim=1)
    return torch.where(overflown, 1.0, doubts.nan_to_num(0, 1)).float() + 1e-12


@pytest.mark.parametrize("backend", backends("par"))
@pytest.mark.parametrize("operator", [afa_kernels.par, afa_kernels.pamr])
@fuzz
@given(st.data())
def test_par(backend, operator, data):
    draw = Draw(data)
    shape = draw.masks(backend, 24)
    batch, channels, height, width = shape
    images = draw.photograph(batch, height, width, draw.choice("images", DTYPES), IMAGE_EXTREMES)
    masks = draw.tensor("masks", *shape, dtype=draw.choice("masks", DTYPES))
    dilations = draw.choice("dilations", [[1], [2, 1], [1, 2, 4, 8, 12, 24], [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    num_iter, present = draw.integer("num_iter", 0, 4), draw.class_mask(batch, channels)
    grad = draw.layout("grad", draw.random(*shape).to(DEVICE, masks.dtype)) if draw.flag("backward") else None

    def run(call, masks, grad):
        leaf = masks.detach().clone().requires_grad_()
        out = call(leaf)
        if grad is not None:
            out.backward(grad)
        return [out.detach()] if grad is None else [out.detach(), leaf.grad]

    with running(backend, draw.generator):
        got = run(lambda leaf: operator(images, leaf, dilations, num_iter, class_mask=present), masks, grad)
    # On the CPU, where PyTorch's deviations do not overflow.
    images, masks, grad, present = (None if item is None else item.cpu() for item in (images, masks, grad, present))
    with afa_kernels.use_backend("reference"):
        want = run(lambda leaf: operator(images, leaf, dilations, num_iter, class_mask=present), masks, grad)
        slack = [0.0, 0.0]
        doubts = doubt(operator, images, dilations)
        if num_iter and doubts.max() > 1e-3:
            weights = afa_kernels.par_weights(images.float(), dilations).double()
            sizes = [None if item is None else item.double().abs() for item in (masks, grad)]

            def diffused(some, options=(tap_offsets(dilations), num_iter, "replicate", present)):
                return run(lambda leaf: afa_kernels.diffuse(some, leaf, *options), *sizes)

            low, high = diffused(weights), diffused(weights + doubts)
            slack = [upper - lower for upper, lower in zip(high, low)]
    for mine, theirs, source, extra in zip(got, want, (masks, grad), slack):
        bound = theirs.abs()  # nothing cancels: neither masks nor weights are negative
        if source is grad:
            # Where a pixel has nothing but tiny weights in its neighbours' sums, they err as their exponents do.
            bound = bound + 0.05 * grad.abs().max()
        if masks.dtype == torch.bfloat16:
            # On CUDA their weights are in half precision: 2^-11 an iteration, below the masks' own rounding, and steps
            # of 6e-8, which show where next to nothing is summed.
            bound = bound + 1e-4 * source.double().abs().nan_to_num(0, 0).max()
        agree(mine.cpu(), theirs, bound, 2e-4, slack=extra)


@pytest.mark.parametrize("backend", backends("par_weights"))
@pytest.mark.parametrize("operator", [afa_kernels.par_weights, afa_kernels.pamr_weights])
@fuzz
@given(st.data())
def test_par_weights(backend, operator, data):
    draw = Draw(data)
    shape = draw.integer("B", 1, 2), draw.integer("H", 1, 24), draw.integer("W", 1, 40)
    images = draw.photograph(*shape, draw.choice("images", DTYPES), IMAGE_EXTREMES)
    dilations = draw.choice("dilations", [[1], [2, 1], [1, 2, 4, 8, 12, 24], [50]])
    with running(backend, draw.generator):
        got = operator(images, dilations)
    # On the CPU, where PyTorch's deviations do not overflow.
    images, got = images.cpu(), got.cpu()
    want = operator(images, dilations, backend="reference")
    agree(got, want, torch.ones_like(want), 2e-5, slack=doubt(operator, images, dilations))
    total = 1.01 if operator is afa_kernels.par_weights else 1.0
    sums, kept = got.double().sum(dim=1), want.isfinite().all(dim=1)
    assert (got >= 0)[kept[:, None].expand_as(got)].all()
    assert ((sums - total).abs()[kept] < 4 * torch.finfo(got.dtype).eps + 1e-5).all()


# --- the compiled entry points ----------------------------------------------------------------------------------------


def nowhere(*shape: int) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """A contiguous float32 tensor as the entry points take it, at no address."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return 0, 0, shape, tuple(strides)


def modules() -> list[str]:
    cpu = [name for name in ("native",) if name in available("par")]
    return [*cpu, "emulated"] if build.compiler() and DEVICE == "cpu" else cpu


def entry_points(module: str):
    return native_module.native if module == "native" else build.load().native


@pytest.mark.parametrize("module", modules())
@fuzz
@given(st.data())
def test_workspace_sizes_are_64_bit(module, data):
    """Sizes whose products pass 2^31 and 2^32: nothing wraps, and more pixels or channels never need less."""
    draw = Draw(data)
    batch, channels = draw.integer("B", 1, 200), draw.integer("C", 1, 2000)
    height, width = draw.integer("H", 1, 60_000), draw.integer("W", 1, 60_000)
    dilations = draw.choice("dilations", [[1], [1, 2, 4, 8, 12, 24]])
    half, num_iter = draw.flag("half weights"), draw.integer("num_iter", 3, 20)
    check_workspace(module, batch, channels, height, width, dilations, half, num_iter)


@pytest.mark.parametrize("module", modules())
def test_workspace_of_one_image_of_40000_by_60000(module):
    check_workspace(module, 1, 1, 40_000, 60_000, [1, 2, 4, 8, 12, 24], False, 10)


def check_workspace(module, batch, channels, height, width, dilations, half, num_iter):
    taps, pixels, native = 8 * len(dilations), height * width, entry_points(module)
    offsets = [0] * (2 * taps)

    def sizes(height: int, channels: int) -> tuple[int, ...]:
        images, masks = nowhere(batch, 3, height, width), nowhere(batch, channels, height, width)
        weights = nowhere(batch, taps, height, width)
        if module == "native":
            return (
                native.par_cpu_workspace(images, masks, dilations, 2),
                native.diffuse_cpu_workspace(weights, masks, offsets, 2),
                native.par_weights_cpu_workspace(images, dilations, 2),
            )
        transpose = True  # the adjoint always streams
        refine = native.par_cuda_workspace(images, masks, dilations, num_iter, transpose, half, 0)
        return refine, native.diffuse_cuda_workspace(weights, masks, offsets, num_iter, transpose, 0)

    refine, diffuse, *image = sizes(height, channels)
    if module == "native":  # one image at a time: its weights and two copies of its masks, in float32
        least = 4 * pixels * (taps + 2 * channels)
        assert refine >= least and diffuse >= least and image[0] >= 4 * 3 * pixels
    else:
        masks, weights = 8 * batch * channels * pixels, (2 if half else 4) * batch * taps * pixels
        assert diffuse >= masks and refine >= masks + weights
    for more in (sizes(height + 1, channels), sizes(height, channels + 1)):
        assert all(after >= before for after, before in zip(more, (refine, diffuse, *image)))
