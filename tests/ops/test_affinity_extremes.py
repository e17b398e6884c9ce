"""Affinity and its losses where numbers end: sigmoids near 0 and 1, queries that are no numbers, labels of a byte.

Against the formula in float64, one pair at a time, which shares no line with the package.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.common import DEVICE, available, relative_error
from support.running import EMULATED

import afa_kernels
from afa_kernels.core import native_module

EVERYWHERE = [*available("attention_affinity_loss"), *EMULATED[-1:]]  # one of their builds: the formulas are the same
HALF = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.parametrize("backend", EVERYWHERE, indirect=["backend"])


def pairs(labels: torch.Tensor, radius: int, ignore_index: int = 255):
    """(b, i, j, same) of every pair that counts, by Python's numbers."""
    batch, height, width = labels.shape
    for b in range(batch):
        rows = labels[b].tolist()
        for i in range(height * width):
            for j in range(height * width):
                (y, x), (v, u) = divmod(i, width), divmod(j, width)
                counts = ignore_index not in (rows[y][x], rows[v][u])
                if counts and abs(y - v) <= radius and abs(x - u) <= radius:
                    yield b, i, j, rows[y][x] == rows[v][u]


def formula(scores: torch.Tensor, labels: torch.Tensor, radius: int, ignore_index: int = 255):
    """Loss and counts from z [B, N, N] in float64."""
    same, different = [], []
    for b, i, j, equal in pairs(labels, radius, ignore_index):
        (same if equal else different).append(torch.sigmoid(scores[b, i, j] * (-1 if equal else 1)))
    zero = scores.new_zeros(1)
    positive, negative = (torch.stack(part).sum() if part else zero.sum() for part in (same, different))
    loss = 0.5 * positive / (len(same) + 1) + 0.5 * negative / (len(different) + 1)
    return loss, len(same) + 1, len(different) + 1


def scores_of(query, key, weight, bias):
    maps = torch.einsum("bhid,bhjd->bhij", query, key)
    return torch.einsum("bhij,h->bij", maps + maps.transpose(2, 3), weight) + bias


def case(rng, height=3, width=4, dtype=torch.float32, spread=1.0, heads=2, depth=3):
    tensors = [spread * torch.randn(1, heads, height * width, depth, generator=rng) for _ in range(2)]
    tensors += [torch.rand(heads, generator=rng), torch.randn(1, generator=rng)]
    labels = torch.randint(3, (1, height, width), generator=rng).to(DEVICE)
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors], labels


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, ignore_index, values",
    [
        (torch.uint8, -1, (0, 1, 255)),
        (torch.uint8, 300, (0, 44, 1)),
        (torch.uint8, 255, (0, 1, 255)),
        (torch.int8, 255, (0, 1, 127)),
        (torch.int8, -1, (0, 1, -1)),
        (torch.int16, -1, (0, 255, -1)),
        (torch.int64, 300, (0, 44, 300)),
    ],
)
def test_labels_are_compared_as_numbers(rng, backend, dtype, ignore_index, values):
    leaves, numbers = case(rng)
    labels = torch.tensor(values, device=DEVICE)[numbers].to(dtype)
    wanted = formula(scores_of(*(leaf.detach().double() for leaf in leaves)), labels, 1, ignore_index)
    window = afa_kernels.window_affinity(*leaves, 3, 4, 1)
    fused = afa_kernels.attention_affinity_loss(*leaves, labels, 1, ignore_index)
    for loss, *counts in (fused, afa_kernels.affinity_loss(window, labels, 1, ignore_index)):
        assert [int(count) for count in counts] == list(wanted[1:])
        assert relative_error(loss, wanted[0]) < 1e-5


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA an assertion on the device, which ends the process")
def test_a_negative_label_of_a_byte_is_refused(rng, backend):
    leaves, numbers = case(rng)
    labels, window = (numbers - 1).to(torch.int8), afa_kernels.window_affinity(*leaves, 3, 4, 1)
    for call in (
        lambda: afa_kernels.attention_affinity_loss(*leaves, labels, 1),
        lambda: afa_kernels.affinity_loss(window, labels, 1),
    ):
        if native_module.on_cuda(labels):  # emulated: the assertion on the device
            with pytest.raises(RuntimeError, match=r"CUDA: labels must be in 0..255 or ignore_index"):
                call()
        else:
            with pytest.raises(ValueError, match=r"^labels must be in 0..255 or ignore_index = 255, got -1"):
                call()


# --- sigmoids near 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("logit", [-12.0, -7.0, 0.0, 7.0, 12.0, 19.0])
def test_slopes_of_a_window_are_those_of_the_logit(backend, dtype, logit):
    """A window that is rounded to half precision is 1 from a logit of 6 (bfloat16) or 9 on, its slope is not 0."""
    query = torch.ones(1, 1, 1, 1, device=DEVICE, dtype=dtype, requires_grad=True)
    key, weight = query.detach().clone(), torch.full((1,), 0.5, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.full((1,), logit - 1, device=DEVICE, dtype=dtype, requires_grad=True)
    # The diagonal's one score counts for both orders: z = 2 * weight * query * key + bias.
    wanted = math.exp(-abs(logit)) / (1 + math.exp(-abs(logit))) ** 2
    maps = query.detach().clone().requires_grad_()
    for out, source, factor in (
        (afa_kernels.window_affinity(query, key, weight, bias, 1, 1, 0), query, 1),
        (afa_kernels.affinity_from_maps(maps, weight, bias, 1, 1, 0), maps, 1),
    ):
        got = torch.autograd.grad(out, (source, weight, bias), torch.ones_like(out))
        for mine, theirs in zip(got, (factor * wanted, 2 * wanted, wanted)):
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert abs(mine.item() - theirs) <= 2 * torch.finfo(dtype).eps * theirs + smallest + 2e-6 * theirs


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_a_sure_head_in_half_precision(rng, backend, dtype):
    leaves, _ = case(rng, dtype=dtype, spread=0.5)
    with torch.no_grad():
        leaves[3].fill_(8.0)
    grad = torch.rand(1, 9, 3, 4, generator=rng).to(DEVICE, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    window = afa_kernels.dense_to_window(torch.sigmoid(scores_of(*wide)), 3, 4, 1)
    wanted = torch.autograd.grad(window, wide, grad.double())
    got = torch.autograd.grad(afa_kernels.window_affinity(*leaves, 3, 4, 1), leaves, grad)
    maps = torch.einsum("bhid,bhjd->bhij", *(leaf.detach() for leaf in leaves[:2])).requires_grad_()
    of_maps = torch.autograd.grad(afa_kernels.affinity_from_maps(maps, *leaves[2:], 3, 4, 1), (maps, leaves[3]), grad)
    for mine, theirs in zip(got, wanted):
        assert relative_error(mine, theirs) < 2 * torch.finfo(dtype).eps
    assert relative_error(of_maps[1], wanted[3]) < 10 * torch.finfo(dtype).eps
    assert float(of_maps[0].float().norm()) > 0


@pytest.mark.parametrize("half", [9.35, 20.0])
@pytest.mark.parametrize("second", [0, 1])
def test_a_loss_near_its_minimum(backend, half, second):
    """Two pixels, of one class or two, that the head is sure of: what is left is a few times 1e-9, or 1e-18."""
    query = torch.tensor([1.0, 1.0 - 2 * second], device=DEVICE).view(1, 1, 2, 1)
    leaves = query, query.clone(), torch.full((1,), half, device=DEVICE), torch.zeros(1, device=DEVICE)
    labels = torch.tensor([[[0, second]]], device=DEVICE)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = formula(scores_of(*wide), labels, 1)[0]
    got = afa_kernels.attention_affinity_loss(*leaves, labels, 1)[0]
    assert 0 < got.item() < 1e-8 and abs(got.item() / wanted.item() - 1) < 2e-6
    mine, theirs = (torch.autograd.grad(loss, of[2])[0] for loss, of in ((got, leaves), (wanted, wide)))
    assert abs(mine.item() / theirs.item() - 1) < 2e-6


# --- no numbers ---------------------------------------------------------------------------------------------

# A grid of two of the kernels' tiles, and the pixel of which something is no number.
SIZE, RADIUS, PIXEL = (3, 12), 2, (1, 5)


def near(radius: int = RADIUS) -> torch.Tensor:
    rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    return (((rows - PIXEL[0]).abs() <= radius) & ((columns - PIXEL[1]).abs() <= radius)).flatten().to(DEVICE)


@pytest.mark.parametrize(
    "spoilt, value, dtype, depth",
    [  # as many channels as the CPU takes at once with either instruction set; vectors of 16 bytes; neither
        ("query", math.nan, torch.float32, 64),
        ("key", -math.inf, torch.float32, 16),
        ("query", math.inf, torch.bfloat16, 8),
        ("key", math.nan, torch.float16, 5),
    ],
)
def test_what_is_no_number_stays_in_its_window(rng, backend, spoilt, value, dtype, depth):
    leaves, labels = case(rng, *SIZE, dtype=dtype, heads=1, depth=depth, spread=0.5)
    grad = torch.rand(1, 25, *SIZE, generator=rng).to(DEVICE, dtype)

    def run(leaves, ignored, fused):
        target = labels.clone()
        if ignored:
            target[0, PIXEL[0], PIXEL[1]] = 255
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        if fused:
            out = afa_kernels.attention_affinity_loss(*leaves, target, RADIUS)[0]
            return torch.autograd.grad(out, leaves)
        out = afa_kernels.window_affinity(*leaves, *SIZE, RADIUS)
        return torch.autograd.grad(out, leaves, grad)

    broken = [leaf.detach().clone() for leaf in leaves]
    pixel = PIXEL[0] * SIZE[1] + PIXEL[1]
    broken[0 if spoilt == "query" else 1][0, 0, pixel, 3] = value
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    far = ~near()
    for fused in (True, False):
        whole, got = run(leaves, False, fused), run(broken, False, fused)
        for mine, theirs in zip(got[:2], whole[:2]):
            assert relative_error(mine[0, 0, far], theirs[0, 0, far]) < tolerance
        if math.isnan(value):
            assert got[0][0, 0, near()].isnan().any() and got[3].isnan().all()
    # Where its label is ignored the pixel is in no pair: nothing at all is touched.
    whole, got = run(leaves, True, True), run(broken, True, True)
    for mine, theirs in zip(got, whole):
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_stays_with_its_pair(rng, backend, value):
    maps = torch.randn(1, 2, 20, 20, generator=rng).to(DEVICE)
    head = torch.rand(2, generator=rng).to(DEVICE).requires_grad_(), torch.zeros(1, device=DEVICE).requires_grad_()

    def run(maps):
        maps = maps.clone().requires_grad_()
        out = afa_kernels.affinity_from_maps(maps, *head, 4, 5, 1)
        return torch.autograd.grad(out.nansum(), (maps, *head))

    wanted, broken = run(maps), maps.clone()
    broken[0, 1, 0, 19] = value  # of the first pixel with the last: no window has it
    for mine, theirs in zip(run(broken), wanted):
        assert relative_error(mine, theirs) < 1e-5
    broken[0, 1, 0, 1] = value
    got = run(broken)[0]
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[0, :, 0, 1] = touched[0, :, 1, 0] = True
    assert relative_error(got[~touched], wanted[0][~touched]) < 1e-5
