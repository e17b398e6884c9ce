"""What else PyTorch asks of every operator: torch.func, tangents, gradients of gradients, tensors without memory."""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE, available, relative_error
from torch.autograd import forward_ad

import afa_kernels

HEIGHT, WIDTH, RADIUS, HEADS = 3, 4, 1, 2
PIXELS, TAPS = HEIGHT * WIDTH, (2 * RADIUS + 1) ** 2
OFFSETS = [(0, 0), (0, 1), (-1, 2), (1, 0), (2, -1)]


def labels(place: str = DEVICE) -> torch.Tensor:
    numbers = torch.arange(PIXELS).view(1, HEIGHT, WIDTH) % 3
    return torch.where(numbers == 2, 255, numbers).to(place)


# name: the shapes of its leaves, and a call of them; for functions that are no operators of their own too.
IMAGE, MASKS, WINDOW = (1, 3, HEIGHT, WIDTH), (1, 2, HEIGHT, WIDTH), (1, TAPS, HEIGHT, WIDTH)
QUERY, HEAD = (1, HEADS, PIXELS, 3), ((HEADS,), (1,))
GRID = HEIGHT, WIDTH, RADIUS
OPERATORS = {
    "diffuse": (((1, 5, HEIGHT, WIDTH), MASKS), lambda w, m: afa_kernels.diffuse(w, m, OFFSETS, 2)),
    "par": ((IMAGE, MASKS), lambda i, m: afa_kernels.par(i, m, (1, 2), 2)),
    "pamr": ((IMAGE, MASKS), lambda i, m: afa_kernels.pamr(i, m, (1,), 2)),
    "par_weights": ((IMAGE,), lambda i: afa_kernels.par_weights(i, (1, 2))),
    "pamr_weights": ((IMAGE,), lambda i: afa_kernels.pamr_weights(i, (1, 2))),
    "window_affinity": ((QUERY, QUERY, *HEAD), lambda *x: afa_kernels.window_affinity(*x, *GRID)),
    "affinity_from_maps": (
        ((1, HEADS, PIXELS, PIXELS), *HEAD),
        lambda *x: afa_kernels.affinity_from_maps(*x, *GRID),
    ),
    "affinity_loss": ((WINDOW,), lambda a: afa_kernels.affinity_loss(a, labels(a.device), RADIUS)[0]),
    "attention_affinity_loss": (
        (QUERY, QUERY, *HEAD),
        lambda *x: afa_kernels.attention_affinity_loss(*x, labels(x[0].device), RADIUS)[0],
    ),
    "random_walk": ((WINDOW, MASKS), lambda a, c: afa_kernels.random_walk(a, c, RADIUS, 2, 2)),
    "random_walk_with_background": (
        (WINDOW, MASKS),
        lambda a, c: afa_kernels.random_walk_with_background(
            a, c, torch.tensor([[1, 0]], device=a.device), (0.3, 0.5), RADIUS
        ),
    ),
    "path_affinity": (((1, 1, HEIGHT, WIDTH),), lambda e: afa_kernels.path_affinity(e, 3)),
    "propagate_to_edge": (
        (MASKS, (1, 1, HEIGHT, WIDTH)),
        lambda c, e: afa_kernels.propagate_to_edge(c, e, 3, 2, 1),
    ),
    "feature_affinity": ((MASKS,), lambda f: afa_kernels.feature_affinity(f - 0.5, RADIUS)),
    "feature_affinity exp_l1": ((MASKS,), lambda f: afa_kernels.feature_affinity(f, RADIUS, "exp_l1")),
    # Centred: of positive features all cosines are, and nothing is cut off.
    "pcm": (((1, 2, 2, 3), (1, 5, HEIGHT, WIDTH)), lambda c, f: afa_kernels.pcm(c, f - 0.5)),
    "sinkhorn": ((WINDOW,), lambda a: afa_kernels.sinkhorn(a, RADIUS, 2, 0.1, symmetric=True)),
    "window_to_dense": ((WINDOW,), lambda a: afa_kernels.window_to_dense(a, RADIUS)),
    "dense_to_window": (((1, PIXELS, PIXELS),), lambda d: afa_kernels.dense_to_window(d, *GRID)),
}
PLAIN = ("window_to_dense", "dense_to_window")  # of PyTorch's own operations
every = pytest.mark.parametrize("name", OPERATORS)


def inputs(rng: torch.Generator, name: str, dtype=torch.float32) -> tuple[list[torch.Tensor], object]:
    shapes, call = OPERATORS[name]
    return [torch.rand(shape, generator=rng).to(DEVICE, dtype) for shape in shapes], call


def directions(rng: torch.Generator, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(leaf.shape, generator=rng).to(leaf) for leaf in leaves)


def slope(call, leaves: list[torch.Tensor], tangents: tuple[torch.Tensor, ...], step: float = 1e-6) -> torch.Tensor:
    """The derivative along the tangents by differences, in float64."""
    ahead, behind = (
        call(*(leaf.double() + sign * step * tangent.double() for leaf, tangent in zip(leaves, tangents)))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@every
def test_tangents_are_carried(rng, name):
    """torch.func.jvp and the dual numbers of forward-mode differentiation."""
    leaves, call = inputs(rng, name)
    tangents = directions(rng, leaves)
    wanted = slope(call, leaves, tangents)
    out, tangent = torch.func.jvp(call, tuple(leaves), tangents)
    assert relative_error(out, call(*leaves)) < 1e-5
    assert relative_error(tangent, wanted) < 1e-3
    with forward_ad.dual_level():
        dual = call(*(forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents)))
        assert relative_error(forward_ad.unpack_dual(dual).tangent, wanted) < 1e-3


@every
def test_gradients_of_torch_func_are_those_of_a_backward(rng, name):
    leaves, call = inputs(rng, name)
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    weight = torch.randn(call(*leaves).shape, generator=rng).to(DEVICE)
    wanted = torch.autograd.grad((call(*own) * weight).sum(), own)
    which = tuple(range(len(leaves)))
    got = torch.func.grad(lambda *x: (call(*x) * weight).sum(), which)(*leaves)
    rows = torch.func.jacrev(lambda x: call(x, *leaves[1:]).flatten()[:3])(leaves[0])
    for mine, theirs in zip(got, wanted):
        assert relative_error(mine, theirs) < 1e-4
    head = torch.autograd.grad(call(*own).flatten()[0], own[0])[0]
    assert relative_error(rows[0], head) < 1e-4
    assert rows.shape == (*call(*leaves).flatten()[:3].shape, *leaves[0].shape)


@every
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_one_call_after_the_other(rng, name):
    first, call = inputs(rng, name)
    second, _ = inputs(rng, name)
    stacked = [torch.stack(pair) for pair in zip(first, second)]
    wanted = torch.stack([call(*first), call(*second)])
    assert relative_error(torch.func.vmap(call)(*stacked), wanted) < 1e-6
    learned = [tensor.requires_grad_() for tensor in stacked]
    assert relative_error(torch.func.vmap(call)(*learned), wanted) < 1e-5
    gradients = torch.func.vmap(torch.func.grad(lambda *x: call(*x).square().sum()))(*stacked)
    own = [tensor.clone().requires_grad_() for tensor in first]
    assert relative_error(gradients[0], torch.autograd.grad(call(*own).square().sum(), own)[0]) < 1e-4


def test_labels_and_class_masks_alone_may_be_mapped(rng):
    (window, cams), _ = inputs(rng, "random_walk")
    both = torch.stack([labels(), torch.zeros_like(labels())])
    losses = torch.func.vmap(lambda chosen: afa_kernels.affinity_loss(window, chosen, RADIUS)[0])(both)
    for chosen, loss in zip(both, losses):
        assert relative_error(loss, afa_kernels.affinity_loss(window, chosen, RADIUS)[0]) < 1e-6
    keep = torch.tensor([[[True, False]], [[True, True]]], device=DEVICE)
    walked = torch.func.vmap(lambda mask: afa_kernels.random_walk(window, cams, RADIUS, class_mask=mask))(keep)
    assert relative_error(walked[1], afa_kernels.random_walk(window, cams, RADIUS)) < 1e-6
    assert torch.equal(walked[0, :, 1], torch.zeros_like(walked[0, :, 1]))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in PLAIN])
@pytest.mark.parametrize("kernels", [name for name in available("par") if name != "reference"])
def test_kernels_that_are_asked_for_say_what_they_have_not(rng, name, kernels):
    leaves, call = inputs(rng, name)
    tangents = directions(rng, leaves)
    with afa_kernels.use_backend(kernels):
        with pytest.raises(ValueError, match=f"{kernels} cannot run .*forward-mode"):
            torch.func.jvp(call, tuple(leaves), tangents)
        with pytest.raises(ValueError, match=f"{kernels} cannot run .*torch.func"):
            torch.func.grad(lambda *x: call(*x).sum())(*leaves)
        with forward_ad.dual_level(), pytest.raises(ValueError, match=f"{kernels} cannot run"):
            call(forward_ad.make_dual(leaves[0], tangents[0]), *leaves[1:])


def test_what_torch_func_does_not_differentiate_stays_with_the_kernels(rng):
    (images, masks), call = inputs(rng, "par")
    with afa_kernels.use_backend("native" if "native" in available("par") else None):
        refined = call(images, masks)
        got = torch.func.grad(lambda factor: (call(images, masks) * factor).sum())(torch.ones((), device=DEVICE))
        tangent = torch.func.jvp(lambda factor: call(images, masks) * factor, (refined,), (torch.ones_like(refined),))
    assert relative_error(got, refined.sum()) < 1e-5
    assert torch.equal(tangent[1], refined)


@every
def test_a_second_backward_is_right_or_refused(rng, name):
    leaves, call = inputs(rng, name)
    ends = torch.randn(call(*leaves).shape, generator=rng).to(DEVICE)
    tangents = directions(rng, leaves)

    def twice(leaves, **options):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        end = ends.to(leaves[0].dtype).clone().requires_grad_()
        first = torch.autograd.grad(call(*leaves).square(), leaves, end, create_graph=True)
        total = sum((one * tangent.to(one)).sum() for one, tangent in zip(first, tangents))
        return torch.autograd.grad(total, [*leaves, end])

    with afa_kernels.use_backend("reference"):
        wanted = twice([leaf.double() for leaf in leaves])
    if name in ("par", "pamr", "par_weights", "pamr_weights", *PLAIN):
        for mine, theirs in zip(twice(leaves), wanted):
            assert relative_error(mine, theirs) < 2e-3
    else:
        with pytest.raises(RuntimeError, match="no autograd formula"):
            twice(leaves)


@pytest.mark.parametrize("name", ["par", "pamr"])
def test_a_second_backward_through_masks_that_come_from_the_images(rng, name):
    (images, _), call = inputs(rng, name)
    tangent = torch.randn(images.shape, generator=rng).to(DEVICE)

    def twice(images):
        images = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(images, images[:, :2] ** 2).square().sum(), images, create_graph=True)
        return torch.autograd.grad((first * tangent.to(first)).sum(), images)[0]

    with afa_kernels.use_backend("reference"):
        wanted = twice(images.double())
    assert relative_error(twice(images), wanted) < 2e-3


@every
def test_tensors_without_memory_have_shapes(rng, name):
    leaves, call = inputs(rng, name)
    out = call(*(leaf.to("meta") for leaf in leaves))
    assert out.device.type == "meta" and out.shape == call(*leaves).shape and out.dtype == torch.float32


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["diffuse", "par", "pamr", "random_walk"])
def test_no_steps_have_a_gradient_of_zero(rng, name, backend):
    leaves = [leaf.requires_grad_() for leaf in inputs(rng, name)[0]]
    last = {"diffuse": (OFFSETS, 0), "random_walk": (RADIUS, 2, 0)}.get(name, ((1,), 0))
    out = getattr(afa_kernels, name)(*leaves, *last, backend=backend)
    of_weights, of_masks = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(out, leaves[1])
    assert torch.equal(of_weights, torch.zeros_like(leaves[0])) and torch.equal(of_masks, torch.ones_like(leaves[1]))


@pytest.mark.skipif(DEVICE != "cpu", reason="of what the CPU's kernels allocate")
@pytest.mark.parametrize("name", [name for name in OPERATORS if "loss" not in name and "background" not in name])
def test_the_default_device_is_no_business_of_an_operator(rng, name):
    """As in a script that has called ``torch.set_default_device``."""
    leaves, call = inputs(rng, name)
    own = [leaf.requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(call(*own).square().sum(), own)
    with torch.device("meta"):
        got = torch.autograd.grad(call(*own).square().sum(), own)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted))
