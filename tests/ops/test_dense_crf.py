"""The dense CRF: recorded numbers, kernels and compatibilities, gradient through all iterations, bad input."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support.common import DEVICE, available, relative_error

from afa_kernels import DenseCRF, bilateral_filter, dense_crf
from afa_kernels.core import native_module

BACKENDS = available("dense_crf")
FAST = BACKENDS[1:]
SMALL = {"num_iter": 3, "bi_xy_std": 8, "bi_rgb_std": 60}
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
each_fast = pytest.mark.parametrize("backend", FAST, indirect=True)


def case(rng, classes=4, height=9, width=14, batch=2):
    images = (255 * torch.rand(batch, 3, height, width, generator=rng)).to(DEVICE, torch.uint8)
    return images, torch.rand(batch, classes, height, width, generator=rng).mul(3).softmax(1).to(DEVICE)


@each_fast
def test_recorded_probabilities(golden, backend):
    arrays = golden("dense_crf")
    settings = [int(arrays[name]) for name in ("iters", "pos_w", "pos_xy_std", "bi_w", "bi_xy_std", "bi_rgb_std")]
    crf = DenseCRF(*settings)
    if DEVICE != "cpu":
        pytest.skip("one numpy image is the host's")
    got = pickle.loads(pickle.dumps(crf))(arrays["image"], arrays["probs"])
    assert got.dtype == np.float32 and np.abs(got - arrays["out"]).max() < 2e-5
    channels_last = arrays["image"][:, ::-1][:, ::-1], arrays["probs"].astype(np.float64)
    assert np.abs(crf(*channels_last) - got).max() < 1e-6


@each_backend
def test_an_iteration_is_the_formula(rng, backend):
    images, probs = case(rng)
    unary = -probs.double().log()
    before = torch.softmax(-unary, 1)
    logits = -unary
    for weight, sigmas in ((3, (None, 3)), (4, (60, 8))):
        norm = bilateral_filter(images, torch.ones_like(before), *sigmas, "exact", backend="reference").rsqrt()
        logits = logits + weight * norm * bilateral_filter(images, norm * before, *sigmas, "exact", backend="reference")
    got = dense_crf(images, probs, **{**SMALL, "num_iter": 1}, method="exact")
    assert relative_error(got, torch.softmax(logits, 1)) < 1e-5


OPTIONS = {
    "lattice": {},
    "exact": {"method": "exact"},
    "before": {"normalization": "before"},
    "after": {"normalization": "after"},
    "none": {"normalization": "none", "pos_w": 0.02, "bi_w": 0.03},
    "early": {"tolerance": 0.1, "num_iter": 6},
    "place alone": {"bi_w": 0},
    "no kernel": {"bi_w": 0, "pos_w": 0},
    "no iteration": {"num_iter": 0},
}


@each_fast
@pytest.mark.parametrize("name", [*OPTIONS, "matrix", "exact matrix"])
def test_options_and_their_gradients_against_the_reference(rng, backend, name):
    images, probs = case(rng, 40 if name in ("lattice", "matrix") else 4)
    grad = torch.randn(probs.shape, generator=rng).to(DEVICE)
    options = {**SMALL, **OPTIONS.get(name, {})}
    if "matrix" in name:
        options["compat"] = torch.rand(probs.shape[1], probs.shape[1], generator=rng).to(DEVICE)
        options["method"] = "exact" if "exact" in name else "lattice"
    got, want = probs.clone().requires_grad_(), probs.double().requires_grad_()
    q, divergence = dense_crf(images, got, **options, convergence=True)
    true, true_divergence = dense_crf(images, want, **options, convergence=True, backend="reference")
    assert relative_error(q, true) < 5e-6
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    assert (divergence.cpu() - true_divergence.cpu()).abs().max() < 1e-4 * true_divergence.abs().max() + 1e-4
    q.backward(grad)
    true.backward(grad.double())
    assert relative_error(got.grad, want.grad) < 1e-5
    assert torch.equal(dense_crf(images, probs, **options), q)


@each_backend
def test_mean_field_lowers_its_divergence_and_stops_when_little_changes(rng, backend):
    images, probs = case(rng)
    options = {**SMALL, "num_iter": 8, "method": "exact"}
    q, divergence = dense_crf(images, probs, **options, convergence=True)
    assert divergence.shape == (2, 9) and (divergence[:, 2:] <= divergence[:, :-2] + 1e-4).all()
    early, stopped = dense_crf(images, probs, **options, convergence=True, tolerance=0.1)
    assert torch.equal(early, dense_crf(images, probs, **{**options, "num_iter": 1}))
    assert torch.equal(stopped, divergence[:, :2].index_select(1, torch.tensor([0] + 8 * [1], device=DEVICE)))
    assert torch.equal(dense_crf(images, probs, **options, tolerance=1e-12), q)


@each_fast
def test_potts_is_the_matrix_with_ones_beside_the_diagonal(rng, backend):
    images, probs = case(rng, 5)
    potts = 1 - torch.eye(5, device=DEVICE)
    want = dense_crf(images, probs, **SMALL)
    assert relative_error(dense_crf(images, probs, **SMALL, compat=potts), want) < 1e-5
    # A matrix that is not symmetric counts as the mean of it and its transpose.
    assert relative_error(dense_crf(images, probs, **SMALL, compat=2 * potts.triu()), want) < 1e-5


@each_fast
def test_images_of_a_batch_know_nothing_of_each_other_and_dtypes(rng, backend):
    images, probs = case(rng)
    both = dense_crf(images, probs, **SMALL)
    assert torch.equal(both[1:], dense_crf(images[1:], probs[1:], **SMALL))
    assert torch.equal(both, dense_crf(images.float(), probs.to(memory_format=torch.channels_last), **SMALL))
    half = dense_crf(images, probs.half(), **SMALL)
    assert half.dtype == torch.float16 and relative_error(half, both) < 2e-3
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dense_crf(images, probs, **SMALL), both)
    assert (dense_crf(images, torch.zeros_like(probs), **SMALL) - 0.25).abs().max() < 1e-5


@each_fast
def test_several_tiles_and_any_number_of_threads(rng, backend):
    images, probs = case(rng, 3, 70, 131, 1)
    images = images // 8
    got = dense_crf(images, probs, **SMALL)
    assert relative_error(got, dense_crf(images, probs.double(), **SMALL, backend="reference")) < 5e-6
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dense_crf(images, probs, **SMALL, convergence=True)[0], got)


@each_fast
def test_opcheck_and_compilation(rng, backend):
    images, probs = case(rng, 3, 3, 4, 1)
    inputs = images.float(), probs.clone().requires_grad_(), 2, [3.0, 3.0, 0.0, 4.0, 8.0, 60.0], None, "lattice"
    torch.library.opcheck(torch.ops.afa.dense_crf, (*inputs, "symmetric", 0.0, True, backend))
    compiled = torch.compile(lambda x, p: dense_crf(x, p, **SMALL), fullgraph=True, backend="aot_eager")
    leaves = [probs.clone().requires_grad_() for _ in range(2)]
    compiled(images, leaves[0]).square().sum().backward()
    dense_crf(images, leaves[1], **SMALL).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.skipif(DEVICE != "cpu" or native_module.native is None, reason="recorded of the CPU's kernels")
def test_recorded_labels_of_the_published_test(golden):
    """The softmax of the recorded logits, resized to the photograph, refined as published."""
    arrays = golden("evaluation")
    image, logits = arrays["image_0"], torch.tensor(arrays["msc_logits_0"]).float()
    logits = logits.view(1, *logits.shape[-3:])
    size = {"size": image.shape[:2], "mode": "bilinear", "align_corners": False}
    probs = torch.nn.functional.interpolate(logits, **size).softmax(1)
    got = DenseCRF(10, 3, 3, 4, 64, 5)(image, probs[0].numpy()).argmax(0)
    assert (got == arrays["test_crf_0"]).mean() > 0.995


IMAGES, PROBS = torch.rand(2, 3, 4, 5, device=DEVICE), torch.rand(2, 4, 4, 5, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"images": IMAGES[:1]}, ValueError, "probs must have shape"),
        ({"images": IMAGES.long()}, TypeError, "images must be one of"),
        ({"probs": PROBS.long()}, TypeError, "probs must be one of"),
        ({"num_iter": -1}, ValueError, "num_iter must be at least 0"),
        ({"num_iter": 2.5}, TypeError, "num_iter must be an integer"),
        ({"pos_xy_std": 0}, ValueError, "pos_xy_std must be"),
        ({"bi_w": float("nan")}, ValueError, "bi_w must be a finite"),
        ({"bi_xy_std": 0}, ValueError, "bi_xy_std must be"),
        ({"bi_rgb_std": 0}, ValueError, "bi_rgb_std must be"),
        ({"compat": PROBS[0, 0]}, ValueError, "compat must have shape"),
        ({"compat": 3.0}, TypeError, "compat must be a tensor"),
        ({"method": "fast"}, ValueError, "method must be"),
        ({"normalization": "both"}, ValueError, "normalization must be one of symmetric"),
        ({"backend": "triton"}, ValueError, "dense_crf has no triton backend"),
    ],
)
def test_bad_input_is_named(change, error, said):
    with pytest.raises(error, match=said):
        dense_crf(**{"images": IMAGES, "probs": PROBS, **change})


@pytest.mark.parametrize(
    ("image", "probmap", "error", "said"),
    [
        (np.zeros((4, 5, 3)), np.ones((2, 4, 5)), TypeError, "image must be of uint8, got float64"),
        (np.zeros((4, 5), np.uint8), np.ones((2, 4, 5)), ValueError, "image must have shape .4, 5, 3. or .3, 4, 5."),
        (np.zeros((4, 5, 3), np.uint8), np.ones((2, 5, 4)), ValueError, "image must have shape .5, 4.* as probmap has"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((5, 4)), ValueError, "probmap must be .C, h, w."),
        (np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), "a"), TypeError, "probmap must hold numbers"),
    ],
)
def test_bad_arrays_are_named(image, probmap, error, said):
    with pytest.raises(error, match=said):
        DenseCRF(10, 3, 3, 4, 64, 5)(image, probmap)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="bi_rgb_std must be"):
        DenseCRF(10, 3, 3, 4, 64, 0)
    with pytest.raises(TypeError, match="iter_max must be an integer"):
        DenseCRF(1.5, 3, 3, 4, 64, 5)
