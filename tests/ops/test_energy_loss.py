"""The dense energy loss: recorded numbers, its gate, its gradient that is not the derivative, sizes, bad input."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.common import DEVICE, available, cut_off, relative_error

from afa_kernels import DenseEnergyLoss
from afa_kernels.ops.bilateral import modules

BACKENDS = available("bilateral_filter")


def case(rng, height=12, width=17):
    images = (255 * torch.rand(2, 3, height, width, generator=rng)).to(DEVICE)
    probs = torch.rand(2, 4, height, width, generator=rng).softmax(1).to(DEVICE).requires_grad_()
    roi = torch.ones(2, height, width, device=DEVICE)
    roi[1, :, 11:] = 0
    label = torch.randint(4, (2, 1, height, width), generator=rng).to(DEVICE)
    label[:, :, :3] = 255
    return images, probs, roi, label


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_recorded_loss_and_gradient(golden, backend, method):
    arrays = {name: torch.tensor(value, device=DEVICE) for name, value in golden("energy_loss").items()}
    label = torch.where(arrays["unlabelled"], 255, 0)[:, None]
    loss = DenseEnergyLoss(2.0, float(arrays["sigma_rgb"]), float(arrays["sigma_xy"]), 1.0, method)
    probs = arrays["probs"].requires_grad_()
    value = loss(arrays["images"], probs, arrays["roi"], label)
    value.backward()
    assert value.shape == (1,)
    assert relative_error(value, 2 * arrays[f"{method}_loss"].view(1)) < 1e-6 * cut_off(backend)
    assert relative_error(probs.grad, 2 * arrays[f"{method}_grad"]) < 1e-6 * cut_off(backend)


def test_half_the_size_is_nearest_pixels_and_bilinear_probabilities(rng):
    images, probs, roi, label = case(rng)
    half = {"scale_factor": 0.5}
    small = torch.nn.functional.interpolate(probs, **half, mode="bilinear", align_corners=False)
    assert small.shape[-2:] == (6, 8)
    picked = [tensor[..., ::2, :16:2] for tensor in (images, roi, label)]
    want = DenseEnergyLoss(1, 15, 5, 1.0)(picked[0], small, *picked[1:])
    got = DenseEnergyLoss(1, 15, 10, 0.5)(images, probs, roi, label)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, probs)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, probs)[0])
    assert gradient.abs().sum() > 0


def test_sure_pixels_and_those_outside_have_no_gradient_and_unlabelled_ones_all_of_it(rng):
    images, _, roi, label = case(rng)
    sure = torch.zeros(2, 4, 12, 17, device=DEVICE)
    sure[:, 1] = 1
    sure.requires_grad_()
    roi[0, :, 12:] = 0.5  # surer than it is inside
    DenseEnergyLoss(1, scale_factor=1)(images, sure, roi, label).backward()
    assert sure.grad[0, 1, :3].abs().min() > 0  # 255: the gate is open
    assert not sure.grad[:, :, 3:].any() and not sure.grad[1, :, :, 11:].any()


def test_the_gradient_is_not_the_derivative_and_costs_no_filter(rng, monkeypatch):
    images, probs, roi, label = case(rng)
    calls = []
    original = modules.bilateral_filter
    monkeypatch.setattr(modules, "bilateral_filter", lambda *args: calls.append(1) or original(*args))
    loss = DenseEnergyLoss(1, 60, 10, 1.0)

    def value(p):
        return loss(images.double(), p, roi.double(), label)

    wide = probs.detach().double().requires_grad_()
    value(wide).backward()
    assert len(calls) == 1
    gate = (roi[:, None] - wide.detach().amax(1, keepdim=True)).clamp_min(0).masked_fill(label == 255, 1)
    near = original(images.double(), wide.detach() * roi[:, None], 60, 10)
    assert relative_error(wide.grad, -2 * roi[:, None] * gate * near / 2) < 1e-12
    # Along a direction the value changes by something else.
    step = torch.rand(wide.shape, generator=rng, dtype=torch.float64).to(DEVICE)
    with torch.no_grad():
        slope = (value(wide + 1e-6 * step) - value(wide - 1e-6 * step)) / 2e-6
    assert relative_error((wide.grad * step).sum(), slope) > 0.1


def test_dtypes_compilation_autocast_and_pickling(rng):
    images, probs, roi, label = case(rng)
    loss = pickle.loads(pickle.dumps(DenseEnergyLoss(1, method="lattice")))
    want = loss(images, probs, roi, label)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(images, probs, roi, label)
    torch.testing.assert_close(got, want)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(loss(images, probs, roi, label), want)
    half = loss(images.to(torch.uint8), probs.half(), roi.bool(), label.to(torch.uint8))
    assert half.dtype == torch.float32 and relative_error(half, want) < 2e-2
    assert "method='lattice'" in repr(loss)


@pytest.mark.parametrize(
    ("which", "change", "error", "said"),
    [
        (0, lambda images: images[:, :2], ValueError, "images must have shape"),
        (1, lambda probs: probs[..., :4], ValueError, "probs must have shape"),
        (1, lambda probs: probs.long(), TypeError, "probs must be one of"),
        (2, lambda roi: roi[:, None], ValueError, "ROIs must have shape"),
        (3, lambda label: label[:, 0], ValueError, "seg_label must have shape"),
    ],
)
def test_bad_input_is_named(rng, which, change, error, said):
    inputs = list(case(rng))
    inputs[which] = change(inputs[which])
    with pytest.raises(error, match=said):
        DenseEnergyLoss()(*inputs)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"sigma_rgb": 0}, ValueError, "sigma_rgb must be"),
        ({"sigma_xy": -1}, ValueError, "sigma_xy must be"),
        ({"scale_factor": 0}, ValueError, "scale_factor must be"),
        ({"method": "both"}, ValueError, "method must be"),
    ],
)
def test_bad_settings_are_named(options, error, said):
    with pytest.raises(error, match=said):
        DenseEnergyLoss(**options)


def test_a_scale_that_leaves_nothing_is_named(rng):
    with pytest.raises(ValueError, match=r"scale_factor 0.05 leaves nothing of \[12, 17\] pixels"):
        DenseEnergyLoss(scale_factor=0.05)(*case(rng))
    assert DenseEnergyLoss(scale_factor=1 / 12)(*case(rng)).isfinite()
