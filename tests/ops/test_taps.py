"""The taps that production counts, beside those that the references count and plain loops."""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE

import afa_kernels
from afa_kernels.core import taps
from afa_kernels.ops.affinity import reference as affinity_reference
from afa_kernels.ops.par import reference as par_reference

GRIDS = [(1, 1, 0), (1, 1, 2), (4, 6, 0), (4, 6, 1), (3, 7, 3), (2, 3, 9)]


@pytest.mark.parametrize("dilations", [[1], [1, 2, 4, 8, 12, 24], [40, 3], [1 << 20]])
def test_taps_of_par(dilations):
    assert taps.ring_offsets(dilations) == par_reference.tap_offsets(dilations)
    for w2 in (0.3, 0.01, 5.0):
        got, want = taps.position_weights(dilations, w2), par_reference.position_weights(dilations, w2)
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-12, atol=0)


def test_position_weights_where_nothing_is_left_of_them():
    want = par_reference.position_weights([1, 2], 1e-200)
    assert want.isnan().all()
    assert torch.tensor(taps.position_weights([1, 2], 1e-200)).isnan().all()


@pytest.mark.parametrize(("height", "width", "radius"), GRIDS)
def test_neighbours_of_a_window(height, width, radius):
    device = torch.device(DEVICE)
    assert taps.window_offsets(radius) == affinity_reference.window_offsets(radius)
    index, inside = taps.window_neighbours(height, width, radius, device)
    wanted, exists = affinity_reference.window_neighbours(height, width, radius, device)
    assert torch.equal(inside, exists)
    assert torch.equal(index, torch.where(exists, wanted, height * width))


@pytest.mark.parametrize(("height", "width", "radius"), GRIDS)
def test_window_and_dense_pair_by_pair(rng, height, width, radius):
    pixels = height * width
    dense = torch.rand(2, pixels, pixels, generator=rng).to(DEVICE)
    window = torch.zeros(2, (2 * radius + 1) ** 2, height, width, device=DEVICE)
    kept = torch.zeros_like(dense)
    for i in range(pixels):
        for j in range(pixels):
            dy, dx = j // width - i // width, j % width - i % width
            if max(abs(dy), abs(dx)) <= radius:
                tap = (dy + radius) * (2 * radius + 1) + dx + radius
                window[:, tap, i // width, i % width] = kept[:, i, j] = dense[:, i, j]
    assert torch.equal(afa_kernels.dense_to_window(dense, height, width, radius), window)
    assert torch.equal(affinity_reference.dense_to_window(dense, height, width, radius), window)
    assert torch.equal(afa_kernels.window_to_dense(window, radius), kept)


def test_far_taps_are_clipped_to_the_image():
    pairs = [(0, 0), (5, -7), (-5, 7), (6, -8), (-(1 << 20), 1 << 20)]
    assert taps.clipped(pairs, 5, 7) == [(0, 0), (5, -7), (-5, 7), (5, -7), (-5, 7)]
