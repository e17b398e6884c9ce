"""The exact bilateral filter's and the Gaussian's CUDA sources, run thread by thread on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.common import relative_error
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated

from afa_kernels import bilateral_filter
from afa_kernels.core import native_module

pytestmark = ON_THE_EMULATOR


def case(rng, batch=1, channels=5, height=13, width=21):
    images = 255 * torch.rand(batch, 3, height, width, generator=rng)
    images[:, :, : height // 2] = images[:, :, :1, :1]  # half of it is flat
    return images, torch.rand(batch, channels, height, width, generator=rng)


def wide(images, values, *sigmas):
    return bilateral_filter(images.double(), values.double(), *sigmas, backend="reference")


def on_device(emulator, images, values, *sigmas, order=0, compiled=90):
    with emulated(emulator, order):
        emulator.set_device(compiled=compiled)
        return bilateral_filter(images, values, *sigmas)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sigmas"),
    [
        ((1, 1, 1, 1), (10, 5)),
        ((2, 3, 1, 200), (20, 5)),
        ((1, 2, 150, 1), (20, 30)),
        ((1, 21, 11, 15), (20, 5)),
        ((1, 40, 9, 15), (20, 5)),
        ((1, 150, 7, 11), (20, 5)),
        ((3, 8, 5, 13), (60, 8)),
        ((1, 9, 16, 16), (1e-30, 1e-30)),
        ((1, 5, 20, 31), (1e9, 1e9)),
        ((1, 4, 23, 37), (None, 2.5)),
        ((2, 3, 70, 41), (None, 0.4)),
        ((1, 2, 9, 37), (None, 300)),
        ((1, 4, 9, 7), (None, 1e-30)),
    ],
)
def test_shapes_and_sigmas_against_float64(rng, either, shape, sigmas):
    images, values = case(rng, *shape)
    got, want = on_device(either, images, values, *sigmas), wide(images, values, *sigmas)
    assert relative_error(got, want) < 1e-6
    assert relative_error(got, bilateral_filter(images, values, *sigmas, backend="native")) < 1e-6


@pytest.mark.parametrize("picture", ["flat", "two colours", "ramp"])
def test_pictures_of_few_colours(rng, emulator, picture):
    """Weights that are all alike add up all their errors."""
    images, values = torch.full((1, 3, 13, 27), 77.0), torch.rand(1, 21, 13, 27, generator=rng)
    if picture == "two colours":
        images[..., 9:] = 91
    elif picture == "ramp":
        images += torch.arange(27.0)
    for sigma_xy in (3, 1000):
        got = on_device(emulator, images, values, 20, sigma_xy)
        assert relative_error(got, wide(images, values, 20, sigma_xy)) < 1e-6
        if picture == "flat":
            assert relative_error(got, on_device(emulator, images, values, None, sigma_xy)) < 1e-6


@pytest.mark.parametrize("largest", [1e-20, 1e-3, 1.0, 7e4, 1e30])
def test_values_of_any_size(rng, emulator, largest):
    """Half precision, in which tensor cores take values, ends at 65504, and channels may be of different sizes."""
    images, values = case(rng)
    values[:, 1:] *= largest
    values[:, 3] -= values[:, 3].mean()
    got, want = on_device(emulator, images, values, 60, 4), wide(images, values, 60, 4)
    for channel in range(values.shape[1]):
        assert relative_error(got[:, channel], want[:, channel]) < 2e-6, channel


def test_far_weights_keep_their_digits(rng, emulator):
    """A pixel in the dark sees many of another colour, each with a weight of 1e-7, at its own weight of 1."""
    images = torch.zeros(1, 3, 32, 40)
    images[:, 0] = 113.5  # at a sigma of 20: exp(-16.1)
    images[:, :, 0, 0] = 0
    values = torch.full((1, 1, 32, 40), 1e4)
    values[..., 0, 0] = 0
    sigmas = 20, 1e6
    got, want = on_device(emulator, images, values, *sigmas)[..., 0, 0], wide(images, values, *sigmas)[..., 0, 0]
    assert 0.5 < float(want) < 5 and relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma_rgb", [60, None])
def test_half_precision_error_is_that_of_rounding(rng, emulator, dtype, sigma_rgb):
    images, values = case(rng, 2, 5)
    values = values.to(dtype)
    got, exact = on_device(emulator, images, values, sigma_rgb, 4), wide(images, values, sigma_rgb, 4)
    assert got.dtype == dtype
    assert relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("sigma_rgb", [60, None])
def test_strides_and_kinds_of_images(rng, emulator, sigma_rgb):
    images, values = case(rng, 2, 5)
    images, last = images.round(), torch.channels_last
    want = on_device(emulator, images, values, sigma_rgb, 4)
    for x, v in [
        (images.to(torch.uint8), values),
        (images.to(memory_format=last), values.to(memory_format=last)),
        (images.transpose(2, 3).contiguous().transpose(2, 3), values.flip(3).flip(3)),
        (images.half(), torch.cat([values, values], 3)[..., :21]),
        (images[:1].expand_as(images).clone().copy_(images), values[:, :1].expand(2, 5, 13, 21)),
    ]:
        got = on_device(emulator, x, v, sigma_rgb, 4)
        assert torch.equal(got, want if v.stride(1) else want[:, :1].expand_as(want))


def test_without_tensor_cores(rng, emulator):
    images, values = case(rng, 2, 11)
    values[0, 3, 12, 20] = float("nan")
    got = on_device(emulator, images, values, 60, 4, compiled=75)
    assert got[0, 3].isnan().all() and got[0, :3].isfinite().all()
    want = wide(images, values, 60, 4)
    assert relative_error(got.nan_to_num(), want.nan_to_num()) < 1e-6


# --- what is left out -------------------------------------------------------------------------------------------------


def counts(emulator, images, values, sigma_rgb, sigma_xy):
    """The result, and pairs of tiles that were met and that there are."""
    view, native = native_module.view, emulator.native
    out, counted = torch.full_like(values, float("nan")), torch.zeros(2, dtype=torch.int64)
    tensors = view(images), view(values)
    scratch = torch.full((native.bilateral_filter_cuda_workspace(*tensors, 0),), 255, dtype=torch.uint8)
    scales = 0.5 / sigma_rgb**2, 0.5 / sigma_xy**2
    native.bilateral_filter_cuda(*tensors, view(out), *scales, counted.data_ptr(), scratch.data_ptr(), 0, 0)
    return out, *counted.tolist()


def test_what_is_left_out_is_less_than_a_millionth(rng, emulator):
    """A smooth photograph, of which most pairs of tiles are too far apart to matter."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    images, values = torch.stack([4 * x, 5 * y, x + y])[None], torch.rand(1, 3, 40, 48, generator=rng)
    values *= torch.where(y < 8, 1.0, 100.0)  # what is far away has most of the value
    for sigmas, most in (((8, 4), 0.6), ((3, 2), 0.35)):
        got, met, pairs = counts(emulator, images, values, *sigmas)
        want, weights = wide(images, values, *sigmas), wide(images, torch.ones_like(values), *sigmas)
        assert pairs == 30**2 and met < most * pairs
        assert ((got - want).abs() <= 1e-6 * 100 * weights + 2e-6 * want).all()
    assert counts(emulator, torch.full_like(images, 9.0), values, 20, 100)[1] == pairs


def test_the_bound_of_what_is_left_out_is_the_stated_one(rng, emulator):
    """Two colours, half of the pixels each: a half weighs exp(-14) = 8e-7 of what the other half adds up to itself."""
    images, values = torch.full((1, 3, 16, 32), 77.0), torch.rand(1, 2, 16, 32, generator=rng)
    images[:, 0, 8:] = 177
    for distance, share in ((13.9, 1.0), (14.1, 0.5)):
        sigmas = 100 / (2 * distance) ** 0.5, 1e6
        got, met, pairs = counts(emulator, images, values, *sigmas)
        assert pairs == 8**2 and met == share * pairs
        assert relative_error(got, wide(images, values, *sigmas)) < 1e-6


def test_several_blocks_share_the_tiles_of_a_small_image(rng, emulator):
    images, values = case(rng, 1, 3, 40, 52)
    results = []
    for multiprocessors in (1, 132):
        emulator.set_device(multiprocessors)
        try:
            emulator.launches()
            results.append(counts(emulator, images, values, 20, 2))
            grid = emulator.launches()[-3].split(" x ")[0]
            assert grid == {1: "17", 132: "34"}[multiprocessors]
        finally:
            emulator.set_device()
    assert results[0][1:] == results[1][1:]
    assert all(relative_error(result, wide(images, values, 20, 2)) < 1e-6 for result, *_ in results)


def test_images_beyond_a_group_are_another_launch(rng, emulator):
    """66 images of a few pixels: 64 are sorted together, with the image above the bits of the pixels."""
    images, values = case(rng, 66, 1, 2, 3)
    got = on_device(emulator, images, values, 60, 2)
    assert relative_error(got, wide(images, values, 60, 2)) < 1e-6


def test_values_that_are_not_finite_are_not_left_out(rng, emulator):
    images, values = case(rng, 1, 3, 20, 25)
    clean = on_device(emulator, images, values, 5, 2)
    for odd in (float("nan"), float("inf")):
        values[0, 1, 19, 24] = odd
        out, cpu = on_device(emulator, images, values, 5, 2), bilateral_filter(images, values, 5, 2, backend="native")
        assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]])
        assert not out[0, 1].isfinite().any() and torch.equal(out[0, 1].isinf(), cpu[0, 1].isinf())
    values[0, 1, 19, 24] = 0
    images[0, 0, 19, 24] = float("inf")
    out = on_device(emulator, images, values, 5, 2)
    assert out[..., 19, 24].isnan().all() and out[..., :19, :].isfinite().all()
    images[0, 0, 19, 24] = float("nan")
    assert on_device(emulator, images, values, 5, 2).isnan().all()


def test_infinity_reaches_as_far_as_the_gaussian(rng, emulator):
    images, values = case(rng, 1, 1, 40, 50)
    values[0, 0, 20, 30] = float("inf")
    got, want = (run(images, values) for run in (
        lambda *inputs: on_device(emulator, *inputs, None, 2), lambda *inputs: bilateral_filter(*inputs, None, 2)
    ))  # fmt: skip
    assert torch.equal(got.isinf(), want.isinf()) and got.isfinite().any() and not got.isnan().any()


# --- races, gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rgb", [30, None])
def test_any_order_of_threads_gives_the_same_bits(rng, emulator, sigma_rgb):
    images, values = case(rng, 1, 5, 17, 18)
    values[0, 2, 3, 4] = float("nan")
    results = [on_device(emulator, images, values, sigma_rgb, 4, order=order).nan_to_num(9) for order in (0, 1, 2)]
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_gradient_is_the_filter(rng, emulator):
    images, values = case(rng)
    grad = torch.randn(values.shape, generator=rng)
    leaf = values.clone().requires_grad_()
    with emulated(emulator):
        bilateral_filter(images, leaf, 60, 4).backward(grad)
    assert relative_error(leaf.grad, wide(images, grad, 60, 4)) < 1e-6
