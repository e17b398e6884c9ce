"""Operators on tensors whose planes or rows lie more than 2^31 elements apart: offsets are computed in 64 bits.

The tensors live in sparse files, of which only what is touched takes memory.
"""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE
from support.fuzzing import backends, running

import afa_kernels

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a sparse file is the host's")

STEP = 2**31 + 12345  # elements from one plane or row to the next
BATCH, HEIGHT, WIDTH, RADIUS, HEADS = 2, 4, 6, 1, 3
GRID = HEIGHT, WIDTH, RADIUS
TAPS = [(dy, dx) for dy in (-1, 1) for dx in (-2, 1)]

# Shapes of what goes far apart, and the operator, which takes it before everything else.
OPERATORS = {
    # The gradients of weights and of images are the reference path's.
    "diffuse": (
        [(BATCH, 4, HEIGHT, WIDTH), (BATCH, 3, HEIGHT, WIDTH)],
        lambda weights, masks: afa_kernels.diffuse(weights.detach(), masks, TAPS, 2),
    ),
    "par": (
        [(BATCH, 3, HEIGHT, WIDTH)] * 2,
        lambda images, masks: afa_kernels.par(images.detach(), masks, (1, 2), 2),
    ),
    "par_weights": ([(BATCH, 3, HEIGHT, WIDTH)], lambda images: afa_kernels.par_weights(images.detach(), (1, 2))),
    "window_affinity": (
        [(BATCH, HEADS, HEIGHT * WIDTH, 8)] * 2,
        lambda query, key: afa_kernels.window_affinity(query, key, *head(), *GRID),
    ),
    "attention_affinity_loss": (
        [(BATCH, HEADS, HEIGHT * WIDTH, 8)] * 2,
        lambda query, key: afa_kernels.attention_affinity_loss(query, key, *head(), labels(), RADIUS)[0],
    ),
    "affinity_from_maps": (
        [(BATCH, HEADS, HEIGHT * WIDTH, HEIGHT * WIDTH)],
        lambda maps: afa_kernels.affinity_from_maps(maps, *head(), *GRID),
    ),
    "affinity_loss": (
        [(BATCH, 9, HEIGHT, WIDTH)],
        lambda window: afa_kernels.affinity_loss(window, labels(), RADIUS)[0],
    ),
    "bilateral_filter": (
        [(BATCH, 3, HEIGHT, WIDTH)] * 2,
        lambda images, values: afa_kernels.bilateral_filter(images.detach().float(), values, 0.5, 3),
    ),
    "feature_affinity": (
        [(BATCH, 3, HEIGHT, WIDTH)],
        lambda f: torch.cat([afa_kernels.feature_affinity(f, RADIUS, kind) for kind in ("relu_dot", "exp_l1")]),
    ),
    "pcm": (
        [(BATCH, 3, HEIGHT, WIDTH), (BATCH, 5, HEIGHT, WIDTH)],
        lambda cams, features: afa_kernels.pcm(cams, features - 0.5),
    ),
    "random_walk": (
        [(BATCH, 9, HEIGHT, WIDTH), (BATCH, 3, HEIGHT, WIDTH)],
        lambda window, cams: afa_kernels.random_walk(window, cams, RADIUS, num_steps=2),
    ),
    "path_affinity": ([(BATCH, 1, HEIGHT, WIDTH)], lambda edge: afa_kernels.path_affinity(edge, 3)),
    "sinkhorn": ([(BATCH, 9, HEIGHT, WIDTH)], lambda window: afa_kernels.sinkhorn(window, RADIUS, 2, symmetric=True)),
}


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1, 1, HEADS), torch.tensor([0.1])


def labels() -> torch.Tensor:
    return torch.arange(BATCH * HEIGHT * WIDTH).view(BATCH, HEIGHT, WIDTH) % 5 // 2


@pytest.fixture
def far_apart(tmp_path):
    """Copies a tensor to a sparse file, STEP elements between the slices of one dimension, all else dense."""
    files = iter(range(100))

    def copy(values: torch.Tensor, dim: int) -> torch.Tensor:
        strides = list(values.select(dim, 0).contiguous().stride())
        strides.insert(dim, STEP)
        size = STEP * values.shape[dim]
        path = tmp_path / str(next(files))
        try:
            memory = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
            path.unlink()
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of {size} elements here: {error}")
        return memory.as_strided(values.shape, strides).copy_(values)

    return copy


def results(call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the operator gives, and the gradients."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = call(*leaves)
    if not out.requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize(
    "dim, dtype",
    [(0, torch.bfloat16), (1, torch.float32), (1, torch.bfloat16), (2, torch.float32)],
    ids=["images-bfloat16", "planes-float32", "planes-bfloat16", "rows-float32"],
)
@pytest.mark.parametrize("operator, backend", [(name, backend) for name in OPERATORS for backend in backends(name)])
def test_planes_and_rows_far_apart(operator, backend, dim, dtype, far_apart, rng):
    shapes, call = OPERATORS[operator]
    near = [torch.rand(shape, generator=rng).to(dtype) for shape in shapes]
    far = [far_apart(values, dim) for values in near]
    with running(backend, rng.manual_seed(1)):
        got = results(call, far)
    with running(backend, rng.manual_seed(1)):
        want = results(call, near)
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
