"""`afa_kernels.compat.pydensecrf` and `.rloss`: the calls that clients make, their layouts, defaults and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.common import relative_error

import afa_kernels
import afa_kernels.compat.pydensecrf.densecrf as dcrf
from afa_kernels import bilateral_filter, dense_crf
from afa_kernels.compat import rloss
from afa_kernels.compat.pydensecrf import utils
from afa_kernels.ops.bilateral import LatticeKernel

H, W, N = 8, 11, 4


@pytest.fixture
def photo():
    random = np.random.default_rng(0)
    probs = random.random((N, H, W)).astype(np.float32)
    return random.integers(0, 256, (H, W, 3)).astype(np.uint8), probs / probs.sum(0)


def built(photo, compat=3, **options):
    image, probs = photo
    crf = dcrf.DenseCRF2D(W, H, N)
    crf.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probs)))
    crf.addPairwiseGaussian(sxy=3, compat=compat, **options)
    crf.addPairwiseBilateral(sxy=8, srgb=60, rgbim=image, compat=compat, **options)
    return crf


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_client_gets_the_recorded_probabilities(golden, backend):
    arrays = golden("dense_crf")
    image, probs = arrays["image"][:24], np.ascontiguousarray(arrays["probs"][:, :24])
    crf = dcrf.DenseCRF2D(80, 24, 5)
    with afa_kernels.use_backend(backend):
        crf.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probs)))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=64, srgb=5, rgbim=np.ascontiguousarray(image), compat=4)
        result = crf.inference(3)
    got = np.array(result, dtype=np.float32).reshape((5, 24, 80))
    want = dense_crf(torch.tensor(image).permute(2, 0, 1)[None], torch.tensor(probs)[None], 3)[0].numpy()
    assert np.abs(got - want).max() < 1e-5
    assert (np.argmax(result, axis=0).reshape(24, 80) == want.argmax(0)).all()


@pytest.mark.parametrize(("name", "value"), [("none", 0), ("before", 1), ("after", 2), ("symmetric", 3)])
def test_normalisations(photo, name, value):
    compat = 3 if value else 0.05
    got = built(photo, compat, normalization=value, kernel=dcrf.FULL_KERNEL).inference(2.0)
    image, probs = torch.tensor(photo[0]).permute(2, 0, 1)[None], torch.tensor(photo[1])[None]
    want = dense_crf(image, probs, 2, compat, 3, compat, 8, 60, normalization=name)[0].flatten(1)
    assert np.abs(got - want.numpy()).max() < 1e-5


def test_signs_of_compatibilities(photo):
    want = built(photo, 3).inference(3)
    for compat in (np.float32(3), -3 * np.ones(N, np.float32), -3 * np.eye(N, dtype=np.float32)):
        assert np.abs(built(photo, compat).inference(3) - want).max() < 1e-6
    upper = np.triu(np.full((N, N), 2, np.float32), 1)
    lower, mean = upper.T.copy(), (upper + upper.T) / 2
    assert np.abs(built(photo, upper).inference(3) - built(photo, mean).inference(3)).max() < 1e-6
    assert np.abs(built(photo, lower).inference(3) - built(photo, mean).inference(3)).max() < 1e-6


def test_stepwise_in_place_and_its_divergence(photo):
    crf = built(photo)
    q, *rest = crf.startInference()
    assert np.abs(q.reshape(N, H, W) - photo[1]).max() < 1e-6
    place, divergences = q, [crf.klDivergence(q)]
    for _ in range(3):
        crf.stepInference(q, *rest)
        divergences.append(crf.klDivergence(q))
    assert q is place and q.dtype == np.float32 and np.abs(q - crf.inference(3)).max() < 1e-6
    image, probs = torch.tensor(photo[0]).permute(2, 0, 1)[None], torch.tensor(photo[1])[None]
    want = dense_crf(image, probs, 3, 3, 3, 3, 8, 60, convergence=True)[1][0]
    assert np.abs(np.array(divergences) - want.numpy()).max() < 1e-3


def test_features_of_the_general_class_are_theirs_row_before_column(photo):
    image, probs = photo
    crf = dcrf.DenseCRF(H * W, N)
    crf.setUnaryEnergy(utils.unary_from_softmax(probs))
    crf.addPairwiseEnergy(utils.create_pairwise_gaussian(sdims=(2, 3), shape=(H, W)), compat=3)
    features = utils.create_pairwise_bilateral(sdims=(7, 8), schan=(60, 50, 40), img=image, chdim=2)
    assert features.shape == (5, H * W) and features.dtype == np.float32
    y, x = 5, 9
    want = [y / 7, x / 8, *(image[y, x] / np.array([60, 50, 40]))]
    assert np.abs(features[:, y * W + x] - want).max() < 1e-5
    crf.addPairwiseEnergy(features, compat=4, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
    other = dcrf.DenseCRF2D(W, H, N)
    other.setUnaryEnergy(utils.unary_from_softmax(probs))
    other.addPairwiseGaussian((3, 2), 3)
    other.addPairwiseBilateral((8, 7), (60, 50, 40), image, 4)
    # The lattice is another where its coordinates come in another order.
    difference = np.abs(crf.inference(2) - other.inference(2)).max()
    assert 1e-6 < difference < 0.1
    assert utils.create_pairwise_bilateral((7, 8), 0.1, photo[1][0]).shape == (3, H * W)


def test_sigmas_are_x_before_y():
    crf = dcrf.DenseCRF2D(W, H, N)
    unary = np.zeros((N, H * W), np.float32)
    unary[0, 4 * W + 5] = -5
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian((4, 0.3), 3)
    spread = np.abs(crf.inference(1).reshape(N, H, W)[0] - 1 / N)
    assert spread[4, 6] > 1e-2 > 1e-5 > spread[5, 5]


def test_points_by_fours(rng):
    """Where their number is no multiple of 4, the lattice has a simplex at the origin too."""
    features = 2 * torch.rand(7, 2, generator=rng) + 0.5
    values, silent = torch.rand(2, 7, generator=rng), torch.zeros(1, 2)
    both = [LatticeKernel(features, None, "none", extra)(values) for extra in (None, silent)]
    assert both[0].shape == both[1].shape == (2, 7) and relative_error(*both) > 1e-3
    crf = dcrf.DenseCRF(7, 2)
    crf.setUnaryEnergy(values.numpy())
    crf.addPairwiseEnergy(features.t().contiguous().numpy(), 1, normalization=dcrf.NO_NORMALIZATION)
    q = torch.tensor(crf.startInference()[0])
    want = (LatticeKernel(features, None, "none", silent)(q) - values).softmax(0)
    assert relative_error(torch.tensor(crf.inference(1)), want) < 1e-6


def test_unaries():
    labels = np.array([[0, 1], [2, 2]])
    wrong, right = -np.log(0.3 / 2), -np.log(0.7)
    got = utils.unary_from_labels(labels, 3, gt_prob=0.7, zero_unsure=False)
    want = np.full((3, 4), wrong)
    want[[0, 1, 2, 2], range(4)] = right
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-6
    unsure = utils.unary_from_labels(labels, 3, 0.7)
    assert np.abs(unsure[:, 0] + np.log(1 / 3)).max() < 1e-6 and abs(unsure[0, 1] - right) < 1e-6
    probs = np.array([[[0.0, 0.25]], [[1.0, 0.75]]])
    assert np.abs(utils.unary_from_softmax(probs)[0] + np.log([1e-5, 0.25])).max() < 1e-5
    assert np.abs(utils.unary_from_softmax(probs, 0.5)[0] + np.log([0.25, 0.375])).max() < 1e-6
    with pytest.raises(AssertionError, match="gt_prob"):
        utils.unary_from_labels(labels, 3, 1.0)


def bad_calls():
    image, unary = np.zeros((H, W, 3), np.uint8), np.zeros((N, H * W), np.float32)
    return {
        "float64": (ValueError, lambda crf: crf.setUnaryEnergy(unary.astype(float)), "u must be float32"),
        "planes": (ValueError, lambda crf: crf.setUnaryEnergy(unary.reshape(N, H, W)), "u must be float32 of 2"),
        "transposed": (ValueError, lambda crf: crf.setUnaryEnergy(unary.T), "u must have shape"),
        "list": (TypeError, lambda crf: crf.setUnaryEnergy(unary.tolist()), "u must be an array"),
        "None": (TypeError, lambda crf: crf.setUnaryEnergy(None), "u must be an array"),
        "image": (ValueError, lambda crf: crf.addPairwiseBilateral(8, 8, image[:, :5], 3), "rgbim must be uint8"),
        "pixels": (ValueError, lambda crf: crf.addPairwiseBilateral(8, 8, image / 1.0, 3), "rgbim must be uint8"),
        "sigma": (ValueError, lambda crf: crf.addPairwiseGaussian((3, 0), 3), "sxy must be a positive"),
        "sigmas": (ValueError, lambda crf: crf.addPairwiseGaussian((3, 3, 3), 3), "sxy must be a positive"),
        "compat": (ValueError, lambda crf: crf.addPairwiseGaussian(3, np.ones(2, np.float32)), "compat must have 4"),
        "kernel": (ValueError, lambda crf: crf.addPairwiseGaussian(3, 3, kernel=5), "kernel must be one of"),
        "features": (ValueError, lambda crf: crf.addPairwiseEnergy(unary[:, :5], 3), "features must have 88 columns"),
        "normal": (ValueError, lambda crf: crf.addPairwiseGaussian(3, 3, normalization=9), "normalization must be"),
        "keyword": (TypeError, lambda crf: crf.inference(niter=3), "niter"),
        "Q": (ValueError, lambda crf: crf.klDivergence(unary[:2]), "Q must have shape"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_named(photo, name):
    error, call, said = bad_calls()[name]
    with pytest.raises(error, match=said):
        call(built(photo))


def test_rloss_writes_in_place(rng):
    images, segs = 255 * torch.rand(2, 3, 6, 7, generator=rng), torch.rand(2, 4, 6, 7, generator=rng)
    out = np.zeros(2 * 4 * 6 * 7, np.float32)
    rloss.bilateralfilter_batch(images.numpy().flatten(), segs.numpy().flatten(), out, 2, 4, 6, 7, 60.0, 5.0)
    want = bilateral_filter(images, segs, 60, 5, "lattice")
    assert np.array_equal(out, want.numpy().flatten())
    one = np.zeros((4, 6, 7), np.float32)
    rloss.bilateralfilter(images[0].numpy(), segs[0].numpy(), one, 6, 7, 60.0, 5.0)
    assert np.array_equal(one, want[0].numpy())
    arrays = images.numpy(), segs.numpy()
    for wrong, said in ((out.astype(float), "AS must be a writable"), (out[::2], "AS must be a writable"),
                        (out[:-1], "AS must have 2")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            rloss.bilateralfilter_batch(*arrays, wrong, 2, 4, 6, 7, 60.0, 5.0)
    with pytest.raises(ValueError, match="segs must have 2"):
        rloss.bilateralfilter_batch(arrays[0], arrays[1][:1], out, 2, 4, 6, 7, 60.0, 5.0)
    with pytest.raises(ValueError, match="N, K, H and W must be at least 1, got 2, 4, 0, 7"):
        rloss.bilateralfilter_batch(*arrays, out, 2, 4, 0, 7, 60.0, 5.0)
    for height, values in ((0, segs[0]), (6, segs[0].flatten()[:-1])):
        with pytest.raises(ValueError, match="seg must hold a multiple of H"):
            rloss.bilateralfilter(images[0].numpy(), values.numpy(), one, height, 7, 60.0, 5.0)


def scene(rng, height=9, width=13):
    images = 255 * torch.rand(2, 3, height, width, generator=rng)
    logits = torch.randn(2, 4, height, width, generator=rng).requires_grad_()
    roi = torch.ones(2, height, width)
    roi[1, :, 8:] = 0
    label = torch.randint(4, (2, 1, height, width), generator=rng)
    label[:, :, :3] = 255
    return images, logits, roi, label


def test_rloss_energy_loss_is_of_the_lattice(rng):
    images, logits, roi, label = scene(rng)
    theirs = rloss.DenseEnergyLoss(weight=2.0, sigma_rgb=60, sigma_xy=20, scale_factor=0.5)
    got = theirs(images=images, segmentations=logits.softmax(1), ROIs=roi, seg_label=label)
    ours = afa_kernels.DenseEnergyLoss(2.0, 60, 20, 0.5, method="lattice")
    assert got.shape == (1,) and torch.equal(got, ours(images, logits.softmax(1), roi, label))
    exact = afa_kernels.DenseEnergyLoss(2.0, 60, 20, 0.5)(images, logits.softmax(1), roi, label)
    assert relative_error(got, exact) > 0.05


def test_copies_that_recompute_the_scale_differ_at_odd_sizes_only(rng):
    def both(height, width):
        images, logits, roi, label = scene(rng, height, width)
        losses = [rloss.DenseEnergyLoss(1.0, 60, 20, 0.5, recompute_scale_factor=again) for again in (False, True)]
        return losses[1], [loss(images, logits.softmax(1), roi, label) for loss in losses]

    loss, (plain, again) = both(8, 12)
    assert torch.equal(plain, again) and "recompute_scale_factor=True" in repr(loss)
    _, (plain, again) = both(9, 13)
    assert relative_error(plain, again) > 1e-4
    images, logits, roi, label = scene(rng)
    how = {"scale_factor": 0.5, "recompute_scale_factor": True}
    small = torch.nn.functional.interpolate(logits.softmax(1), mode="bilinear", align_corners=False, **how)
    nearest = [torch.nn.functional.interpolate(x.float(), **how) for x in (images, roi[:, None], label)]
    want = rloss.DenseEnergyLoss(1.0, 60, 10, 1.0)(nearest[0], small, nearest[1][:, 0], nearest[2].long())
    got = rloss.DenseEnergyLoss(1.0, 60, 20, 0.5, recompute_scale_factor=True)(images, logits.softmax(1), roi, label)
    torch.testing.assert_close(got, want)


def test_the_older_loss_has_no_gate(rng):
    images, logits, roi, _ = scene(rng)
    probs = logits.detach().softmax(1).requires_grad_()
    loss = rloss.DenseCRFLoss(3.0, 60, 10, 1.0)(images, probs, roi)
    loss.backward()
    near = bilateral_filter(images, probs.detach() * roi[:, None], 60, 10, "lattice")
    assert loss.shape == (1,) and relative_error(loss, -3 * (probs * roi[:, None] * near).sum().view(1) / 2) < 1e-5
    assert relative_error(probs.grad, -3 * 2 * near * roi[:, None] / 2) < 1e-5
    everywhere = rloss.DenseCRFLoss(3.0, 60, 10, 1.0)(images, probs)
    assert torch.equal(everywhere, rloss.DenseCRFLoss(3.0, 60, 10, 1.0)(images, probs, torch.ones_like(roi)))


def test_energy_loss_of_a_training_script(rng):
    images, logits, roi, label = scene(rng)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    layer = rloss.DenseEnergyLoss(1e-7, 15, 100, 0.5)
    boxes = [[0, 9, 0, 13], [0, 9, 0, 8]]
    want = layer(images, logits.softmax(1), roi, label)
    for given in (boxes, torch.tensor(boxes)):
        got = rloss.get_energy_loss((images - mean) / std, logits, label[:, 0], given, layer)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    given = [[torch.tensor(side) for side in box] for box in ([-3, 9, 0, 99], boxes[1])]
    got = rloss.get_energy_loss((images - mean) / std, logits, label[:, 0], given, layer)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="img_box must have a box for each of the 2 images, got 1"):
        rloss.get_energy_loss(images, logits, label[:, 0], boxes[:1], layer)
    whole = rloss.get_energy_loss((images - mean) / std, logits, label[:, 0], None, layer)
    torch.testing.assert_close(whole, layer(images, logits.softmax(1), torch.ones_like(roi), label), rtol=1e-4, atol=0)
    (slope,) = torch.autograd.grad(got, logits)
    assert slope.abs().sum() > 0


def two_ways(crf, count, monkeypatch):
    """All iterations at once, and one by one; whether the first really was at once."""
    called = []
    original = dcrf.crf_of_energies
    monkeypatch.setattr(dcrf, "crf_of_energies", lambda *args: called.append(1) or original(*args))
    q, *rest = crf.startInference()
    for _ in range(count):
        crf.stepInference(q, *rest)
    assert not called
    return crf.inference(count), q, bool(called)


@pytest.mark.parametrize("normalization", [0, 1, 2, 3])
def test_iterations_at_once_are_those_one_by_one(photo, monkeypatch, normalization):
    crf = built(photo, 3 if normalization else 0.05, normalization=normalization)
    crf.addPairwiseBilateral(sxy=5, srgb=(30, 30, 30), rgbim=photo[0].copy(), compat=-0.5, normalization=normalization)
    at_once, one_by_one, fast = two_ways(crf, 3, monkeypatch)
    assert fast and at_once.shape == (N, H * W) and np.abs(at_once - one_by_one).max() < 1e-5
    assert np.abs(at_once - crf.startInference()[0]).max() > 1e-2
    assert np.abs(crf.inference(0) - crf.startInference()[0]).max() < 1e-6


def test_terms_of_other_kinds_are_taken_one_by_one(photo, monkeypatch):
    image, probs = photo
    others = {
        "matrix": lambda crf: crf.addPairwiseGaussian(sxy=3, compat=np.eye(N, dtype=np.float32)),
        "wider": lambda crf: crf.addPairwiseGaussian(sxy=(3, 5), compat=3),
        "colours": lambda crf: crf.addPairwiseBilateral(8, (60, 50, 60), image, 4),
        "image": lambda crf: crf.addPairwiseBilateral(8, 60, 255 - image, 4),
        "norm": lambda crf: crf.addPairwiseGaussian(sxy=3, compat=3, normalization=0),
        "features": lambda crf: crf.addPairwiseEnergy(np.ones((2, H * W), np.float32), compat=3),
    }
    for name, add in others.items():
        crf = built(photo)
        add(crf)
        got, want, fast = two_ways(crf, 2, monkeypatch)
        assert not fast and np.array_equal(got, want), name
    odd = dcrf.DenseCRF2D(W - 2, H - 1, N)
    odd.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probs[:, :-1, :-2])))
    odd.addPairwiseGaussian(sxy=3, compat=3)
    assert not two_ways(odd, 2, monkeypatch)[2], "points by fours"
    assert two_ways(built(photo), 2, monkeypatch)[2]
