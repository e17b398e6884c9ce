"""Affinity from attention: recorded numbers, grids and types of every kind. What PyTorch asks of it:
test_affinity_interface.
"""

from __future__ import annotations

import pytest
import torch
from support.affinity_cases import random_case
from support.common import DEVICE, available, relative_error
from support.running import EMULATED, running

import afa_kernels
from afa_kernels.ops.affinity import reference as affinity_reference
from afa_kernels.ops.affinity.losses import check_labels

BACKENDS = available("attention_affinity_loss")


@pytest.fixture(params=[*BACKENDS, *EMULATED])
def backend(request):
    with running(request.param) as name:
        yield name


def spare_the_interpreter(backend, work):
    """Skips a case that would keep Triton's interpreter busy for long; compiled, every case runs."""
    if DEVICE == "cpu" and backend == "triton" and work:
        pytest.skip("Triton's interpreter takes too long for it; smaller cases take the same path")


def recorded(arrays):
    """The recorded case as the operators take it; query, key and the head ask for gradients."""
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in arrays.items()}
    sizes = {name: int(tensors[name]) for name in ("height", "width", "radius")}
    leaves = {
        "query": torch.cat([tensors["query_0"], tensors["query_1"]], dim=1),
        "key": torch.cat([tensors["key_0"], tensors["key_1"]], dim=1),
        "head_weight": tensors["head_weight"],
        "head_bias": tensors["head_bias"],
    }
    return tensors, sizes, {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def brute_force(query, key, head_weight, head_bias, height, width, radius):
    """The window one pair at a time, in float64."""
    query, key = query.double(), key.double()
    steps = range(-radius, radius + 1)
    taps = (2 * radius + 1) ** 2
    window = torch.zeros(query.shape[0], taps, height, width, dtype=torch.float64, device=DEVICE)
    for y in range(height):
        for x in range(width):
            for tap, (dy, dx) in enumerate((dy, dx) for dy in steps for dx in steps):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    i, j = y * width + x, (y + dy) * width + x + dx
                    score = (query[:, :, i] * key[:, :, j] + query[:, :, j] * key[:, :, i]).sum(-1)
                    window[:, tap, y, x] = torch.sigmoid(score @ head_weight.double() + head_bias.double())
    return window


# --- recorded numbers ---------------------------------------------------------------------------------------


def test_recorded_affinity(golden, backend):
    tensors, sizes, leaves = recorded(golden("affinity_loss"))
    window = afa_kernels.window_affinity(**leaves, **sizes)
    wanted = afa_kernels.dense_to_window(tensors["affinity"], **sizes)
    assert relative_error(window, wanted) < 1e-5
    maps = leaves["query"] @ leaves["key"].transpose(2, 3)
    head = leaves["head_weight"], leaves["head_bias"]
    assert relative_error(afa_kernels.affinity_from_maps(maps, *head, **sizes), wanted) < 1e-5


def check_recorded_gradients(tensors, leaves):
    for name in ("query", "key"):
        wanted = torch.cat([tensors[f"grad_{name}_0"], tensors[f"grad_{name}_1"]], dim=1)
        assert relative_error(leaves[name].grad, wanted) < 1e-4
    for name in ("head_weight", "head_bias"):
        assert relative_error(leaves[name].grad, tensors[f"grad_{name}"]) < 1e-4


def check_recorded_loss(tensors, result):
    loss, pos_count, neg_count = result
    assert relative_error(loss, tensors["loss"]) < 1e-5
    assert (int(pos_count), int(neg_count)) == (int(tensors["pos_count"]), int(tensors["neg_count"]))


def test_recorded_fused_loss_and_gradients(golden, backend):
    tensors, sizes, leaves = recorded(golden("affinity_loss"))
    labels = tensors["labels"][:, ::16, ::16]
    result = afa_kernels.attention_affinity_loss(**leaves, labels=labels, radius=sizes["radius"])
    check_recorded_loss(tensors, result)
    result[0].backward()
    check_recorded_gradients(tensors, leaves)


def test_recorded_loss_of_a_window_and_gradients(golden, backend):
    tensors, sizes, leaves = recorded(golden("affinity_loss"))
    labels = tensors["labels"][:, ::16, ::16]
    window = afa_kernels.window_affinity(**leaves, **sizes)
    result = afa_kernels.affinity_loss(window, labels, sizes["radius"])
    check_recorded_loss(tensors, result)
    result[0].backward()
    check_recorded_gradients(tensors, leaves)


def test_recorded_gradient_of_maps(golden, backend):
    tensors, sizes, leaves = recorded(golden("affinity_loss"))
    maps = (leaves["query"] @ leaves["key"].transpose(2, 3)).detach().requires_grad_()
    head = leaves["head_weight"], leaves["head_bias"]
    window = afa_kernels.affinity_from_maps(maps, *head, **sizes)
    loss, _, _ = afa_kernels.affinity_loss(window, tensors["labels"][:, ::16, ::16], sizes["radius"])
    loss.backward()
    wanted = torch.cat([tensors["grad_attn_0"], tensors["grad_attn_1"]], dim=1)
    assert relative_error(maps.grad, wanted) < 1e-4
    assert relative_error(leaves["head_weight"].grad, tensors["grad_head_weight"]) < 1e-4


def test_recorded_window_mask(golden):
    for name, wanted in golden("window_mask").items():
        height, width, radius = (int(part[1:]) for part in name.split("_"))
        ones = torch.ones(1, (2 * radius + 1) ** 2, height, width, device=DEVICE)
        dense = afa_kernels.window_to_dense(ones, radius)[0]
        assert torch.equal(dense.cpu(), torch.from_numpy(wanted).float())


# --- what holds on every grid -------------------------------------------------------------------------------

GRIDS = [
    (1, 1, 0),
    (1, 1, 3),
    (5, 3, 0),
    (4, 7, 1),
    (7, 4, 2),
    (3, 5, 8),
    (1, 19, 4),
    (18, 1, 4),
    (11, 13, 3),
]


@pytest.mark.parametrize("height, width, radius", GRIDS)
def test_window_against_one_pair_at_a_time(rng, backend, height, width, radius):
    leaves, _ = random_case(rng, height=height, width=width)
    window = afa_kernels.window_affinity(*leaves, height, width, radius)
    assert relative_error(window, brute_force(*leaves, height, width, radius)) < 1e-5


@pytest.mark.parametrize("height, width, radius", [*GRIDS, (20, 20, 8), (9, 40, 8), (40, 9, 32)])
@pytest.mark.parametrize("heads, depth", [(1, 1), (3, 5), (2, 40)])
def test_loss_and_gradients_against_the_reference(rng, backend, height, width, radius, heads, depth):
    spare_the_interpreter(backend, height * width > 150 or ((heads, depth) == (2, 40) and height * width > 20))
    leaves, labels = random_case(rng, height=height, width=width, heads=heads, depth=depth)
    result = afa_kernels.attention_affinity_loss(*leaves, labels, radius)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = afa_kernels.attention_affinity_loss(*wide, labels, radius, backend="reference")
    assert [int(count) for count in result[1:]] == [int(count) for count in wanted[1:]]
    assert relative_error(result[0], wanted[0]) < 1e-5
    result[0].backward()
    wanted[0].backward()
    for got, want in zip(leaves, wide):
        assert relative_error(got.grad, want.grad) < 1e-4 or (got.grad - want.grad).abs().max() < 5e-8


@pytest.mark.parametrize("height, width, radius", GRIDS)
def test_conversions_undo_each_other(rng, height, width, radius):
    leaves, _ = random_case(rng, height=height, width=width)
    window = afa_kernels.window_affinity(*leaves, height, width, radius).detach()
    dense = afa_kernels.window_to_dense(window, radius)
    assert torch.equal(dense, dense.transpose(1, 2)) or relative_error(dense, dense.transpose(1, 2)) < 1e-6
    assert torch.equal(afa_kernels.dense_to_window(dense, height, width, radius), window)


def test_window_gradients_against_the_reference(rng, backend):
    leaves, _ = random_case(rng, height=7, width=5, heads=4, depth=6)
    grad = torch.randn(2, 25, 7, 5, generator=rng).to(DEVICE)
    window = afa_kernels.window_affinity(*leaves, 7, 5, 2)
    got = torch.autograd.grad(window, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = afa_kernels.window_affinity(*wide, 7, 5, 2, backend="reference")
    for mine, theirs in zip(got, torch.autograd.grad(reference, wide, grad.double())):
        assert relative_error(mine, theirs) < 1e-4


def test_what_taps_outside_the_image_hold_plays_no_part(rng, backend):
    leaves, labels = random_case(rng, height=4, width=6)
    window = afa_kernels.window_affinity(*leaves, 4, 6, 3).detach()
    inside = affinity_reference.window_neighbours(4, 6, 3, window.device)[1].view(1, 49, 4, 6)
    assert torch.equal(window[:, ~inside[0]], torch.zeros_like(window[:, ~inside[0]]))
    poisoned = torch.where(inside, window, torch.nan).requires_grad_()
    got = afa_kernels.affinity_loss(poisoned, labels, 3)
    wanted = afa_kernels.affinity_loss(window, labels, 3)
    assert torch.equal(got[0], wanted[0])
    got[0].backward()
    assert torch.isfinite(poisoned.grad).all()


def test_a_nan_pixel_stays_with_the_pairs_it_is_in(rng, backend):
    (query, key, weight, bias), _ = random_case(rng, batch=1, height=5, width=8)
    with torch.no_grad():
        query[0, 1, 3 * 8 + 6, 2] = torch.nan
    window = afa_kernels.window_affinity(query, key, weight, bias, 5, 8, 2)
    rows, columns = torch.arange(5, device=DEVICE)[:, None], torch.arange(8, device=DEVICE)
    reached = ((rows - 3).abs() <= 2) & ((columns - 6).abs() <= 2)
    assert torch.equal(window.isnan().any(1)[0], reached)


# --- labels -------------------------------------------------------------------------------------------------


def test_all_labels_ignored_gives_zero_and_finite_gradients(rng, backend):
    leaves, labels = random_case(rng)
    for fused in (True, False):
        nothing = torch.full_like(labels, 255)
        if fused:
            result = afa_kernels.attention_affinity_loss(*leaves, nothing, 2)
        else:
            result = afa_kernels.affinity_loss(afa_kernels.window_affinity(*leaves, 6, 9, 2), nothing, 2)
        assert [value.item() for value in result] == [0, 1, 1]
        for grad in torch.autograd.grad(result[0], leaves):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_a_single_class_has_no_negative_pairs(rng, backend):
    leaves, labels = random_case(rng)
    loss, pos_count, neg_count = afa_kernels.attention_affinity_loss(*leaves, torch.full_like(labels, 7), 1)
    window = afa_kernels.window_affinity(*leaves, 6, 9, 1).double()
    pairs = 2 * (6 * 3 - 2) * (9 * 3 - 2)
    assert (int(pos_count), int(neg_count)) == (pairs + 1, 1)
    assert relative_error(loss, 0.5 * (pairs - window.sum()) / (pairs + 1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_labels_of_any_integer_type(rng, backend, dtype, ignore_index):
    if dtype == torch.uint8 and ignore_index < 0:
        pytest.skip("an unsigned type holds no -1")
    leaves, labels = random_case(rng)
    wanted = afa_kernels.attention_affinity_loss(*leaves, labels, 2)
    renamed = torch.where(labels == 255, ignore_index, labels + (ignore_index == 0)).to(dtype)
    got = afa_kernels.attention_affinity_loss(*leaves, renamed, 2, ignore_index)
    for mine, theirs in zip(got, wanted):
        assert torch.equal(mine, theirs)


# --- strides, types, modes ----------------------------------------------------------------------------------


def test_query_and_key_straight_from_an_attention_layer(rng, backend):
    """[B, N, 2, heads, d] as one linear layer gives it: nothing need be made contiguous."""
    _, labels = random_case(rng, height=5, width=6)
    packed = torch.randn(2, 30, 2, 4, 8, generator=rng).to(DEVICE).requires_grad_()
    weight, bias = (torch.randn(4, generator=rng) / 3).to(DEVICE), torch.zeros(1, device=DEVICE)
    query, key = packed.permute(2, 0, 3, 1, 4)
    got, _, _ = afa_kernels.attention_affinity_loss(query, key, weight, bias, labels, 2)
    (mine,) = torch.autograd.grad(got, packed)
    dense = query.contiguous(), key.contiguous()
    wanted, _, _ = afa_kernels.attention_affinity_loss(*dense, weight, bias, labels, 2, backend="reference")
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(mine, torch.autograd.grad(wanted, packed)[0]) < 1e-4


def test_a_window_of_any_stride(rng, backend):
    leaves, labels = random_case(rng)
    window = afa_kernels.window_affinity(*leaves, 6, 9, 2).detach()
    wanted = afa_kernels.affinity_loss(window, labels, 2)
    strided = [
        window.to(memory_format=torch.channels_last),
        window.flip(3).flip(3),
        window.expand(2, -1, -1, -1),
    ]
    for affinity in strided:
        assert relative_error(afa_kernels.affinity_loss(affinity, labels, 2)[0], wanted[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_the_same_in_pytorch(rng, backend, dtype):
    leaves, labels = random_case(rng, height=8, width=8, heads=4, depth=32, dtype=dtype)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    true_loss, _, _ = afa_kernels.attention_affinity_loss(*wide, labels, 3, backend="reference")
    true_grads = torch.autograd.grad(true_loss, wide)

    plain = [leaf.detach().requires_grad_() for leaf in leaves]
    maps = plain[0] @ plain[1].transpose(2, 3)
    scores = torch.einsum("bhij,h->bij", maps + maps.transpose(2, 3), plain[2])
    window = affinity_reference.dense_to_window(torch.sigmoid(scores + plain[3]), 8, 8, 3)
    targets = check_labels(labels, 255)
    plain_loss, _, _ = affinity_reference.affinity_loss(window, targets, 3)
    plain_grads = torch.autograd.grad(plain_loss, plain)

    loss, _, _ = afa_kernels.attention_affinity_loss(*leaves, labels, 3)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    assert relative_error(loss, true_loss) <= max(2 * relative_error(plain_loss, true_loss), 1e-6)
    for mine, plain_grad, true_grad in zip(grads, plain_grads, true_grads):
        assert mine.dtype == dtype
        assert relative_error(mine, true_grad) <= 2 * relative_error(plain_grad, true_grad) + 1e-6

    affinity = afa_kernels.window_affinity(*leaves, 8, 8, 3)
    wanted = afa_kernels.window_affinity(*wide, 8, 8, 3, backend="reference")
    assert affinity.dtype == dtype
    assert relative_error(affinity, wanted) <= 2 * relative_error(window, wanted)


def test_autocast_changes_nothing(rng, backend):
    leaves, labels = random_case(rng)
    wanted = afa_kernels.attention_affinity_loss(*leaves, labels, 2)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = afa_kernels.attention_affinity_loss(*leaves, labels, 2)[0]
        window = afa_kernels.window_affinity(*leaves, 6, 9, 2)
    assert torch.equal(got, wanted)
    assert torch.equal(window, afa_kernels.window_affinity(*leaves, 6, 9, 2))


def test_half_precision_query_with_a_float_head_as_under_autocast(rng, backend):
    leaves, labels = random_case(rng, dtype=torch.bfloat16)
    head = [leaf.detach().float().requires_grad_() for leaf in leaves[2:]]
    loss, _, _ = afa_kernels.attention_affinity_loss(*leaves[:2], *head, labels, 2)
    grads = torch.autograd.grad(loss, [*leaves[:2], *head])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_same_bits_every_time_inputs_untouched_no_grad(rng, backend):
    leaves, labels = random_case(rng, height=6, width=12, depth=16)
    before = [leaf.detach().clone() for leaf in leaves]
    runs = []
    for _ in range(2):
        loss, _, _ = afa_kernels.attention_affinity_loss(*leaves, labels, 4)
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))
    with torch.no_grad():
        quiet, _, _ = afa_kernels.attention_affinity_loss(*leaves, labels, 4)
    assert not quiet.requires_grad
    assert torch.equal(quiet, runs[0][0])
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before))


def test_the_head_as_a_convolution_has_it(rng, backend):
    (query, key, weight, bias), _ = random_case(rng)
    wanted = afa_kernels.window_affinity(query, key, weight, bias, 6, 9, 2)
    got = afa_kernels.window_affinity(query, key, weight.view(1, -1, 1, 1), bias[0], 6, 9, 2)
    assert torch.equal(got, wanted)


def test_only_some_inputs_need_gradients(rng, backend):
    leaves, labels = random_case(rng, batch=1, height=4, width=5)
    everything = torch.autograd.grad(afa_kernels.attention_affinity_loss(*leaves, labels, 2)[0], leaves)
    for chosen in range(4):
        some = [leaf.detach().requires_grad_(i == chosen) for i, leaf in enumerate(leaves)]
        loss, _, _ = afa_kernels.attention_affinity_loss(*some, labels, 2)
        (got,) = torch.autograd.grad(loss, some[chosen])
        assert relative_error(got, everything[chosen]) < 1e-6
