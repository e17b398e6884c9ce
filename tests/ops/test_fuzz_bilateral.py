"""The bilateral filter and the dense CRF on inputs nobody chose: shapes, strides, dtypes, channels, sigmas and extreme
values, against the reference. See `fuzzing`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE
from support.fuzzing import DTYPES, EMULATED, EXTREMES, Draw, agree, backends, fuzz, running, without_limit

import afa_kernels

pytestmark = [without_limit]

SIGMAS_RGB = [1e-3, 0.5, 5.0, 60.0, 1e5]
SIGMAS_XY = [1e-3, 0.5, 3.0, 64.0, 1e6]


def photograph(draw: Draw, batch: int, height: int, width: int) -> torch.Tensor:
    """Grey levels: where a colour is not a whole one, another rounding of it may be in another simplex."""
    images = draw.photograph(batch, height, width, torch.float32, [0.0, 0.5, 1.0])
    levels = (255 * images.clamp(0, 1)).round()
    return draw.layout("levels", levels).to(draw.choice("images", [torch.uint8, torch.float32, torch.bfloat16]))


def shape_of(draw: Draw, backend: str) -> tuple[int, int, int, int]:
    batch, _, height, width = draw.masks(backend, 24)
    channels = draw.choice("K", [1, 2, 5, 21] if backend in EMULATED.values() else [1, 2, 5, 21, 150])
    return batch, channels, height, width


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("backend", backends("bilateral_filter"))
@fuzz
@given(st.data())
def test_bilateral_filter(backend, method, data):
    draw = Draw(data)
    shape = shape_of(draw, backend)
    images = photograph(draw, shape[0], *shape[2:])
    sigmas = draw.choice("sigma_rgb", [None, *SIGMAS_RGB]), draw.choice("sigma_xy", SIGMAS_XY)
    # Of place alone it ends somewhere: what is not a number does not come from beyond, as it does in the reference.
    extremes = [0.0, 1e-30, 1e30] if sigmas[0] is None else EXTREMES
    values = draw.tensor("values", *shape, dtype=draw.choice("values", DTYPES), extremes=extremes, low=-1)
    grad = draw.random(*shape).to(DEVICE, values.dtype)

    def run(values, grad):
        leaf = values.detach().clone().requires_grad_()
        out = afa_kernels.bilateral_filter(images, leaf, *sigmas, method)
        out.backward(grad)
        return out.detach(), leaf.grad

    with running(backend, draw.generator):
        got = run(values, grad)
    with afa_kernels.use_backend("reference"):
        want = run(values, grad)
        bound = run(values.float().abs(), grad.float())
    for pair in zip(got, want, bound):
        agree(*pair, 1e-5)


@pytest.mark.parametrize("method", ["exact", "lattice"])
@pytest.mark.parametrize("backend", backends("dense_crf"))
@fuzz
@given(st.data())
def test_dense_crf(backend, method, data):
    draw = Draw(data)
    batch, channels, height, width = shape_of(draw, backend)
    images = photograph(draw, batch, height, width)
    probs = draw.tensor("probs", batch, channels, height, width, dtype=torch.float32, extremes=[0.0, 1e-30, 1.0])
    options = {"num_iter": draw.integer("num_iter", 0, 3), "method": method}
    options |= {"pos_xy_std": draw.choice("pos_xy_std", SIGMAS_XY), "bi_xy_std": draw.choice("bi_xy_std", SIGMAS_XY)}
    options |= {"bi_rgb_std": draw.choice("bi_rgb_std", SIGMAS_RGB)}
    options |= {"pos_w": draw.choice("pos_w", [0.0, 0.2, 3.0]), "bi_w": draw.choice("bi_w", [0.0, -0.2, 4.0])}
    options["normalization"] = draw.choice("normalization", ["symmetric", "before", "after"])
    if draw.flag("compat"):
        options["compat"] = draw.random(channels, channels).to(DEVICE)
    grad = draw.random(*probs.shape).to(DEVICE)

    def run(probs):
        leaf = probs.detach().clone().requires_grad_()
        out = afa_kernels.dense_crf(images, leaf, **options)
        out.backward(grad.to(out.dtype))
        return out.detach(), leaf.grad

    with running(backend, draw.generator):
        got, slope = run(probs)
    with afa_kernels.use_backend("reference"):
        want, wanted = run(probs)
    assert (got - want).abs().max() < 1e-4 and (got.sum(1) - 1).abs().max() < 1e-5
    assert slope.isfinite().all() and (slope - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="takes the memory of a host")
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_more_points_than_float32_counts(method):
    """2^24 and some: the last pixels are their own, not those before them."""
    images, values = torch.zeros(1, 3, 4099, 4099, dtype=torch.uint8), torch.zeros(1, 1, 4099, 4099)
    values[..., -1, -1] = 1
    out = afa_kernels.bilateral_filter(images, values, None, 1.0, method)[0, 0]
    near = out[-20:, -20:].clone()
    out[-20:, -20:] = 0
    assert near[-1, -1] > 0.3 and not out.any()
    if method == "exact":
        torch.testing.assert_close(near[-1, -3:], torch.tensor([math.exp(-2), math.exp(-0.5), 1.0]))


def test_an_image_too_long_for_the_lattice_is_refused():
    images, values = torch.zeros(1, 3, 1, 40_000), torch.ones(1, 1, 1, 40_000)
    with pytest.raises(ValueError, match=r"sigma_xy must be at least 0.61\d* for the lattice of an image of 40000 "):
        afa_kernels.bilateral_filter(images, values, None, 0.5, "lattice")
    assert afa_kernels.bilateral_filter(images, values, None, 0.62, "lattice").isfinite().all()
    one = values[..., :9].clone()
    one[..., :4] = one[..., 5:] = 0
    alone = afa_kernels.bilateral_filter(images[..., :9], one, None, 1e-9, "lattice")
    assert alone[..., 4] > 0.3 and not alone[..., :4].any() and not alone[..., 5:].any()
