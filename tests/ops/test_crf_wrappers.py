"""The copied wrappers around pydensecrf: settings, layouts, batches, arrays and tensors."""

from __future__ import annotations

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from support.common import DEVICE, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import afa_kernels
import afa_kernels.compat.crf as copies
import afa_kernels.compat.pydensecrf.densecrf as dcrf
from afa_kernels import (
    DenseCRF,
    DenseEnergyLoss,
    bilateral_filter,
    crf_inference,
    crf_inference_label,
    dense_crf,
)
from afa_kernels.compat.pydensecrf.utils import unary_from_labels, unary_from_softmax

H, W, C = 8, 12, 4  # a number of pixels by fours, as pydensecrf takes them


@pytest.fixture
def photos():
    """A batch of two, [B, h, w, 3] uint8, with probabilities and labels."""
    random = np.random.default_rng(1)
    images = random.integers(100, 112, (2, H, W, 3)).astype(np.uint8)
    probs = random.random((2, C, H, W)).astype(np.float32) ** 3
    return images, probs / probs.sum(1, keepdims=True), random.integers(0, C, (2, H, W))


def by_hand(unary, image, sxy, srgb, t):
    """As the copies call pydensecrf."""
    crf = dcrf.DenseCRF2D(W, H, C)
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=sxy[0], compat=3)
    crf.addPairwiseBilateral(sxy=sxy[1], srgb=srgb, rgbim=np.copy(image), compat=10)
    return np.array(crf.inference(t)).reshape(C, H, W)


@pytest.mark.parametrize("scale", [1, 4.0])
def test_probabilities_are_those_of_the_copies(photos, scale):
    images, probs, _ = photos
    want = by_hand(unary_from_softmax(probs[0]), images[0], (3 / scale, 80 / scale), 13, 3)
    got = crf_inference(images[0], probs[0], t=3, scale_factor=scale, labels=C)
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-5 and np.abs(got - probs[0]).max() > 1e-2
    other = copies.dense_crf(probs[0], images[0].transpose(2, 0, 1), C, 3, scale)
    assert np.array_equal(other, got)
    assert np.array_equal(copies.dense_crf(probs[0], images[0]), crf_inference(images[0], probs[0], 1))
    assert np.array_equal(crf_inference(images[0], probs[0]), crf_inference(images[0], probs[0], 10, 1))


@pytest.mark.parametrize(("gt_prob", "more"), [(0.7, {}), (0.9999, {"gt_prob": 0.9999})])
def test_labels_are_those_of_the_copies(photos, gt_prob, more):
    images, _, labels = photos
    labels = np.where(np.random.default_rng(0).random(labels.shape) < 0.7, 1, labels)
    unary = unary_from_labels(labels[0], C, gt_prob, zero_unsure=False)
    want = by_hand(unary, images[0], (3, 50), 5, 4).argmax(0)
    got = crf_inference_label(images[0], labels[0], 4, C, **more)
    assert got.dtype == np.int64 and (got == want).all() and (got != labels[0]).any()


def test_labels_may_be_surer_than_any_probability(photos):
    """Energies are taken as they are: a pixel stays that would go over to the others with a probability of 1e-5."""
    flat, labels = np.full((H, W, 3), 90, np.uint8), np.zeros((H, W), np.int64)
    labels[4, 5] = 1
    stays = [crf_inference_label(flat, labels, 10, C, 1 - wrong)[4, 5] for wrong in (1e-4, 1e-7)]
    assert stays == [0, 1]


def test_labels_move_where_the_energies_say(photos):
    """One wrong pixel in a flat image goes over to its neighbours, unless it is sure."""
    image, labels = np.full((H, W, 3), 90, np.uint8), np.zeros((H, W), np.uint8)
    labels[4, 5] = 2
    assert not crf_inference_label(image, labels, n_labels=3).any()
    assert crf_inference_label(image, labels, 0, 3)[4, 5] == 2


def test_the_copies_signatures():
    def names(function):
        return [(key, value.default) for key, value in inspect.signature(function).parameters.items()][2:]

    assert names(crf_inference) == [("t", 10), ("scale_factor", 1), ("labels", None)]
    assert names(crf_inference_label) == [("t", 10), ("n_labels", 21), ("gt_prob", 0.7)]
    assert names(copies.dense_crf) == [("n_classes", None), ("n_iters", 1), ("scale_factor", 1)]
    assert copies.DenseCRF is DenseCRF is afa_kernels.DenseCRF and copies.crf_inference is crf_inference


CALLS = {
    "crf_inference": lambda image, probs, labels: crf_inference(image, probs, 2),
    "crf_inference_label": lambda image, probs, labels: crf_inference_label(image, labels, 2, C),
    "DenseCRF": lambda image, probs, labels: DenseCRF(2, 3, 3, 4, 8, 60)(image, probs),
    "dense_crf": lambda image, probs, labels: copies.dense_crf(probs, image, C, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_tensors_one_and_many(photos, name):
    images, probs, labels = photos
    call = CALLS[name]
    want = np.stack([call(images[i], probs[i], labels[i]) for i in range(2)])
    first = images.transpose(0, 3, 1, 2)
    assert np.abs(call(images, probs, labels) - want).max() < 1e-6
    assert np.abs(call(first, probs, labels) - want).max() < 1e-6
    taken = [torch.from_numpy(value.copy()).to(DEVICE) for value in (first, probs, labels)]
    got = call(*taken)
    assert isinstance(got, torch.Tensor) and got.device == taken[1].device
    assert np.abs(got.cpu().numpy() - want).max() < 1e-6
    assert np.abs(call(taken[0].movedim(1, -1), *taken[1:]).cpu().numpy() - want).max() < 1e-6
    assert np.abs(call(images, *taken[1:]).cpu().numpy() - want).max() < 1e-6  # an array and a tensor
    if name == "crf_inference_label":
        assert np.array_equal(call(images, None, labels.astype(np.uint8)), want)
    else:
        wide = probs.astype(np.float64)[..., ::-1][..., ::-1]
        assert call(images, wide, None).dtype == np.float32 and np.abs(call(images, wide, None) - want).max() < 1e-6


def test_a_shape_that_fits_both_is_read_by_its_kind(rng):
    cube = torch.tensor([100, 101, 0])[:, None, None].expand(3, 3, 3).clone().to(torch.uint8)
    cube[:, 1] += 3
    probs = torch.rand(2, 3, 3, generator=rng).softmax(0)
    tensors = crf_inference(cube, probs, 2, 9)
    arrays = crf_inference(cube.permute(1, 2, 0).numpy(), probs.numpy(), 2, 9)
    assert relative_error(torch.tensor(arrays), tensors) < 1e-6
    assert relative_error(torch.tensor(crf_inference(cube.numpy(), probs.numpy(), 2, 9)), tensors) > 1e-4


def test_lists_are_taken_as_arrays(photos):
    images, probs, _ = photos
    refined = crf_inference(images[0], probs[0].tolist())
    assert refined.dtype == np.float32
    np.testing.assert_array_equal(refined, crf_inference(images[0], probs[0]))


def test_tensors_keep_dtype_and_gradient(photos):
    images, probs, _ = (torch.from_numpy(value).to(DEVICE) for value in photos)
    probs = probs.bfloat16().requires_grad_()
    refined = crf_inference(images.float(), probs, 2)
    assert refined.dtype == torch.bfloat16
    refined[:, 0].sum().backward()
    want = dense_crf(images.permute(0, 3, 1, 2), probs.detach(), 2, 3, 3, 10, 80, 13)
    assert probs.grad.abs().sum() > 0 and torch.equal(refined.detach(), want)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda i, p, x: crf_inference(i[:, :5], p), ValueError, r"img must have shape \[2, 8, 12, 3\].* as probs"),
        (lambda i, p, x: crf_inference(i[0], p), ValueError, "img must have shape"),
        (lambda i, p, x: crf_inference(i / 255, p), TypeError, "img must be of uint8, got float64"),
        (lambda i, p, x: crf_inference(i, p[0, 0]), ValueError, "probs must be"),
        (lambda i, p, x: crf_inference(i, p.astype(object)), TypeError, "probs must hold numbers"),
        (lambda i, p, x: crf_inference(i, p, labels=21), ValueError, "labels must be the 4 channels of probs, got 21"),
        (lambda i, p, x: crf_inference(i, p, -1), ValueError, "t must be at least 0"),
        (lambda i, p, x: crf_inference(i, p, 1, 0), ValueError, "scale_factor must be a finite positive"),
        (lambda i, p, x: copies.dense_crf(p, i, 5), ValueError, "n_classes must be the 4 channels"),
        (lambda i, p, x: copies.dense_crf(p, i, None, -2), ValueError, "n_iters must be at least 0"),
        (lambda i, p, x: crf_inference_label(i, x, n_labels=3), ValueError, r"labels must be in 0\.\.2.*, got 0\.\.3"),
        (lambda i, p, x: crf_inference_label(i, x - 1, n_labels=4), ValueError, r"labels .*, got -1\.\.2"),
        (lambda i, p, x: crf_inference_label(i, x / 2.0), TypeError, "labels must be of bool"),
        (lambda i, p, x: crf_inference_label(i, x[0, 0]), ValueError, "labels must be .h, w."),
        (lambda i, p, x: crf_inference_label(i, x, gt_prob=1), ValueError, "gt_prob must be between 0 and 1"),
        (lambda i, p, x: crf_inference_label(i, x, n_labels=1), ValueError, "n_labels must be at least 2"),
    ],
)
def test_what_is_wrong_is_named(photos, call, error, said):
    with pytest.raises(error, match=said):
        call(*photos)


def test_probabilities_below_the_least_count_as_it(photos):
    images, probs, _ = photos
    zeros = probs.copy()
    zeros[:, 0] = 0
    small = np.where(zeros == 0, np.float32(1e-5), zeros)
    assert np.array_equal(crf_inference(images, zeros, 2), crf_inference(images, small, 2))
    assert math.isfinite(crf_inference(images, zeros, 2).sum())


def _of_images(name, images):
    """What takes images and a deviation of grey levels, called."""
    probs, labels = torch.full((1, C, H, W), 1 / C), torch.zeros(1, H, W, dtype=torch.long)
    calls = {
        "filter": lambda: bilateral_filter(images, probs, 1, 5),
        "crf": lambda: dense_crf(images, probs, 1),
        "probabilities": lambda: crf_inference(images[0], probs[0], 1),
        "labels": lambda: crf_inference_label(images[0], labels[0], 1, C),
        "energy": lambda: DenseEnergyLoss()(images, probs, torch.ones(1, H, W), labels[:, None]),
    }
    return calls[name]()


@pytest.mark.parametrize("name", ["filter", "crf", "probabilities", "labels", "energy"])
def test_floats_of_another_range_draw_a_warning(rng, name):
    images = 0.1 + 0.9 * torch.rand(1, 3, H, W, generator=rng)
    with pytest.warns(UserWarning, match=r"must be in 0\.\.255, .* these are in 0\.1\d*\.\.(0\.9\d*|1)"):
        _of_images(name, images)
    with pytest.warns(UserWarning, match=r"must be in 0\.\.255, .* these are in -1\.\d*\.\.(1\.\d*|2)"):
        _of_images(name, 4 * images - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for right in (255 * images, (2 * images).ceil().byte(), 0 * images, 1.02 * images / images.max()):
            _of_images(name, right)


@pytest.mark.parametrize("name", ["filter", "crf", "energy"])
def test_grey_levels_slightly_below_0_draw_none(rng, name):
    """As denormalising leaves black, and a bicubic resize what is beside white."""
    photo = (256 * torch.rand(1, 3, H, W, generator=rng)).floor()
    photo[..., : W // 2] = 0
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    deviation = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for levels in (photo, torch.zeros_like(photo)):
            denormalised = (levels - mean) / deviation * deviation + mean
            assert denormalised.min() < 0
            _of_images(name, denormalised)
        _of_images(name, photo - 12)
    with pytest.warns(UserWarning, match=r"must be in 0\.\.255"):
        _of_images(name, (photo * 0.1 - mean) / deviation)  # dark: below 0 throughout


def test_images_are_not_looked_at_where_numbers_may_not_be_asked_for(rng):
    images, values = torch.rand(1, 3, H, W, generator=rng), torch.ones(1, 1, H, W)
    graph = make_fx(lambda *tensors: bilateral_filter(*tensors, 15, 5))(images, values)
    with pytest.warns(UserWarning, match=r"must be in 0\.\.255"):
        wanted = bilateral_filter(images, values, 15, 5)
    assert torch.equal(graph(images, values), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert bilateral_filter(images, values, 15, 5).shape == values.shape


def test_colours_that_do_not_count_draw_none(rng):
    images, probs = torch.rand(1, 3, H, W, generator=rng), torch.full((1, C, H, W), 1 / C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_crf(images, probs, 1, bi_w=0)


def test_a_deviation_below_one_is_of_images_in_0_to_1(rng):
    images, values = torch.rand(1, 3, H, W, generator=rng), torch.ones(1, 1, H, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bilateral_filter(images, values, 0.99, 5)
        bilateral_filter(images, values, None, 5)
