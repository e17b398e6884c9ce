"""PAR and PAMR of images with any number of channels, and of one image for several masks or the reverse."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.common import DEVICE, available, relative_error

from afa_kernels import PAR, pamr, pamr_weights, par, par_weights

BACKENDS = available("par")


def plain(images, masks, dilations, num_iter, factors):
    """Sums over taps one after the other, in float64, with the images and masks repeated."""
    images, masks = images.double(), masks.double()
    batch = max(len(images), len(masks))
    images, masks = images.expand(batch, -1, -1, -1), masks.expand(batch, -1, -1, -1)
    offsets = [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]

    def near(values):
        rows, columns = (torch.arange(size) for size in values.shape[2:])
        ends = [size - 1 for size in values.shape[2:]]
        taps = [values[:, :, (rows + y).clamp(0, ends[0])][..., (columns + x).clamp(0, ends[1])] for y, x in offsets]
        return torch.stack(taps, 2)

    around, centre = near(images), images[:, :, None]
    if factors:
        w1, w2, w3 = factors
        kappa = -(((around - centre) / (around.std(2, keepdim=True) + 1e-8) / w1) ** 2)
        far = torch.tensor(offsets).double().norm(dim=1)
        place = w3 * torch.softmax(-((far / (far.std() + 1e-8) / w2) ** 2), 0)[:, None, None]
    else:
        every = torch.cat([around, *[centre] * len(dilations)], 2)
        kappa, place = -(around - centre).abs() / (1e-8 + 0.1 * every.std(2, keepdim=True)), 0
    weights = torch.softmax(kappa.mean(1), 1) + place
    for _ in range(num_iter):
        masks = (near(masks) * weights[:, None]).sum(2)
    return weights, masks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batches", [(1, 1), (2, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_and_batches(rng, backend, batches, channels):
    images = torch.rand(batches[0], channels, 7, 9, generator=rng)
    masks = torch.rand(batches[1], 2, 7, 9, generator=rng)
    for operator, factors in ((par, [0.3, 0.3, 0.01]), (pamr, [])):
        leaf = masks.clone().to(DEVICE).requires_grad_()
        got = operator(images.to(DEVICE), leaf, (1, 2), 2, backend=backend)
        weights, want = plain(images, masks, (1, 2), 2, factors)
        assert got.shape == want.shape and relative_error(got.cpu(), want) < 1e-5
        exact = masks.double().requires_grad_()
        plain(images, exact, (1, 2), 2, factors)[1].square().sum().backward()
        got.square().sum().backward()
        assert relative_error(leaf.grad.cpu(), exact.grad) < 1e-5
        made = (par_weights if factors else pamr_weights)(images.to(DEVICE), (1, 2), backend=backend)
        assert relative_error(made.cpu(), weights[: len(images)]) < 1e-5


@pytest.mark.parametrize("channels", [1, 4])
def test_the_gradient_of_the_images(rng, channels):
    images, masks = torch.rand(1, channels, 6, 7, generator=rng), torch.rand(2, 2, 6, 7, generator=rng)
    leaf, exact = images.clone().to(DEVICE).requires_grad_(), images.double().requires_grad_()
    par(leaf, masks.to(DEVICE), (1, 2), 2).square().sum().backward()
    plain(exact, masks, (1, 2), 2, [0.3, 0.3, 0.01])[1].square().sum().backward()
    assert relative_error(leaf.grad.cpu(), exact.grad) < 1e-3


@pytest.mark.parametrize("resize", ["mask", "image"])
@pytest.mark.parametrize("batches", [(1, 2), (2, 1)], ids=str)
def test_sizes_class_masks_and_dtypes(rng, batches, resize):
    images = torch.rand(batches[0], 1, 10, 12, generator=rng).to(DEVICE)
    masks = torch.rand(batches[1], 3, 5, 7, generator=rng).to(DEVICE)
    present = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)[: batches[1]]
    options = {"num_iter": 2, "dilations": (1, 2), "resize": resize}
    got = par(images, masks, class_mask=present, **options)
    alone = [
        par(images[[i % batches[0]]], masks[[i % batches[1]]], class_mask=present[[i % batches[1]]], **options)
        for i in range(2)
    ]
    assert relative_error(got, torch.cat(alone)) < 1e-6
    assert par(images, masks.half(), **options).dtype == torch.float16


# --- several masks of the same images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("refine", [par, pamr])
@pytest.mark.parametrize("batches", [(2, 2), (1, 3), (3, 1)])
def test_several_masks_are_refined_as_each_alone(rng, backend, refine, batches):
    shown, scored = batches
    images = torch.rand(shown, 3, 8, 9, generator=rng).to(DEVICE)
    low, high = (torch.rand(scored, channels, 5, 6, generator=rng).to(DEVICE).requires_grad_() for channels in (2, 3))
    got = refine(images, [low, high], (1, 2), 2)
    want = [refine(images, each, (1, 2), 2) for each in (low, high)]
    assert isinstance(got, list) and [each.shape for each in got] == [each.shape for each in want]
    for mine, alone, leaf in zip(got, want, (low, high)):
        assert relative_error(mine, alone) < 1e-6
        grads = [torch.autograd.grad(each.square().sum(), leaf, retain_graph=True)[0] for each in (mine, alone)]
        assert relative_error(*grads) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_several_masks_have_a_class_mask_each(rng, backend):
    images, masks = torch.rand(2, 3, 8, 9, generator=rng).to(DEVICE), torch.rand(2, 2, 8, 9, generator=rng).to(DEVICE)
    wanted = torch.tensor([[True, False], [False, True]], device=DEVICE)
    got = par(images, (masks, masks), (1,), 2, class_mask=(None, wanted))
    assert torch.equal(got[0], par(images, masks, (1,), 2))
    assert torch.equal(got[1], par(images, masks, (1,), 2, class_mask=wanted))
    assert not got[1][0, 1].any() and got[0][0, 1].any()


def test_weights_of_several_masks_are_made_once(rng, monkeypatch):
    made = []
    kernels = importlib.import_module("afa_kernels.ops.par.native")
    original = kernels.par
    monkeypatch.setattr(kernels, "par", lambda *inputs: made.append(1) or original(*inputs))
    images, masks = torch.rand(1, 3, 8, 9, generator=rng).to(DEVICE), torch.rand(1, 2, 8, 9, generator=rng).to(DEVICE)
    PAR([1, 2], 2).to(DEVICE)(images, [masks, masks])
    if "native" in available("par"):
        assert len(made) == 1


@pytest.mark.parametrize(
    ("masks", "more", "error", "said"),
    [
        ([], {}, ValueError, "masks must hold at least one tensor"),
        ([(2, 2, 5, 6), (2, 2, 6, 5)], {}, ValueError, r"masks\[1\] must have shape"),
        ([(2, 2, 5, 6), (1, 2, 5, 6)], {}, ValueError, r"masks\[1\] must have shape"),
        ([(2, 2, 5, 6), (2, 5, 6)], {}, ValueError, r"masks\[1\] must have shape"),
        ([(2, 2, 5, 6), None], {}, TypeError, r"masks\[1\] must be a tensor"),
        ([(2, 2, 5, 6)] * 2, {"class_mask": torch.ones(2, 2) > 0}, ValueError, "class_mask must be a sequence of 2"),
        ([(2, 2, 5, 6)] * 2, {"class_mask": [None]}, ValueError, "class_mask must be a sequence of 2"),
        ([(2, 2, 5, 6)] * 2, {"class_mask": [None, torch.ones(2, 3) > 0]}, ValueError, "class_mask must have shape"),
    ],
)
def test_what_is_wrong_with_several_masks_is_named(masks, more, error, said):
    taken = [shape if shape is None else torch.rand(shape) for shape in masks]
    with pytest.raises(error, match=said):
        par(torch.rand(2, 3, 8, 9), taken, **more)
