"""What the fused affinity loss keeps for its backward, against scores that are computed again."""

from __future__ import annotations

import math

import pytest
import torch
from support.affinity_cases import random_case
from support.common import DEVICE, available, relative_error
from support.cuda_emulator import build
from support.cuda_emulator.operators import emulated
from support.running import EMULATED, running
from torch.utils.checkpoint import checkpoint

from afa_kernels import attention_affinity_loss
from afa_kernels.ops.affinity import native as calls
from afa_kernels.ops.affinity.losses import check_labels

ON_GPU = EMULATED if DEVICE == "cpu" else ["native"]
NATIVE = [name for name in available("attention_affinity_loss") if name == "native"]
KEEPING = [*NATIVE, *EMULATED]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
# Of results that are rounded to the dtype, sums of factors that are: at most a few units in the last place.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

pytestmark = pytest.mark.skipif(not KEEPING, reason="no native kernels")


@pytest.fixture(params=KEEPING)
def keeping(request):
    """The native kernels are at work, of this device or emulated; those that keep float32 whatever the queries are."""
    with running(request.param):
        yield "float32" if DEVICE == "cpu" and request.param == "native" else "as the queries"


@pytest.fixture(params=ON_GPU)
def on_gpu(request):
    with running(request.param):
        yield


def gradients(leaves, labels, radius, upstream=1.0, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = attention_affinity_loss(*leaves, labels, radius, **options)[0]
    return torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


def reference(leaves, labels, radius, upstream=1.0):
    wide = [leaf.detach().double() for leaf in leaves]
    return gradients(wide, labels, radius, upstream, backend="reference")


def kept_of(leaves, labels, radius):
    with torch.no_grad():
        return torch.ops.afa.attention_affinity_loss(*leaves, check_labels(labels, 255), radius, -1, True, "native")[3]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height, width, radius", [(9, 10, 4), (33, 7, 8), (1, 1, 3)])
def test_gradients_are_those_of_scores_computed_again(rng, keeping, dtype, height, width, radius):
    """Several images, ignored labels, tiles beyond the grid's edge, and a loss that is one of a sum."""
    leaves, labels = random_case(rng, heads=2, height=height, width=width, depth=8, dtype=dtype)
    got = gradients(leaves, labels, radius, -3.7)
    again = gradients(leaves, labels, radius, -3.7, recompute=True)
    wanted = reference(leaves, labels, radius, -3.7)
    for mine, other, theirs in zip(got, again, wanted):
        assert mine.dtype == dtype and float(theirs.norm()) > 0
        assert relative_error(mine, theirs) < 2 * TOLERANCES[dtype]
        assert relative_error(mine, other) < 2 * TOLERANCES[dtype]
    if keeping == "float32" or dtype == torch.float32:  # nothing is rounded on the way
        assert all(torch.equal(mine, other) for mine, other in zip(got[:3], again[:3]))
    if keeping == "float32":  # on a GPU the bias's sum has another order
        assert torch.equal(got[3], again[3])


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator's device")
@pytest.mark.parametrize("dtype", HALF)
def test_without_tensor_cores(rng, dtype):
    """Half precision by multiply-adds: what is kept is of the same type, and G float32."""
    leaves, labels = random_case(rng, height=9, width=11, depth=16, dtype=dtype)
    with emulated(build.load()) as emulator:
        emulator.set_device(compiled=75)
        assert kept_of(leaves, labels, 3).dtype == torch.float16
        got, again = (gradients(leaves, labels, 3, recompute=how) for how in (False, True))
    for mine, other, theirs in zip(got, again, reference(leaves, labels, 3)):
        assert relative_error(mine, theirs) < TOLERANCES[dtype]
        assert relative_error(mine, other) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, error", [(15.0, 2.0**-11), (20.0, 2.0**-11), (25.0, 0.02)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sure_scores_keep_their_gradients(rng, keeping, dtype, size, error, sign):
    """Where the sigmoid's derivative is 3e-7, 2e-9 and 1e-11, of which float16 as it is has the first alone. Of one
    class, so that nothing cancels.
    """
    (query, key, weight, _), labels = random_case(rng, batch=1, heads=1, height=4, width=9, dtype=dtype)
    leaves = [0.01 * query.abs(), key.abs(), weight.abs().float(), torch.full((1,), sign * size, device=DEVICE)]
    labels[labels != 255] = 3
    upstream = 2.0 ** round(size * math.log2(math.e))
    for mine, theirs in zip(gradients(leaves, labels, 2, upstream), reference(leaves, labels, 2, upstream)):
        allowed = 1e-5 if dtype == torch.float32 else error
        assert relative_error(mine, theirs) < allowed + (0 if mine.dtype == torch.float32 else TOLERANCES[dtype])
        assert torch.equal(mine == 0, theirs == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_counts_where_all_labels_are_ignored(rng, keeping, dtype):
    leaves, labels = random_case(rng, heads=1, height=3, width=10, dtype=dtype)
    nothing = torch.full_like(labels, 255)
    assert torch.equal(kept_of(leaves, nothing, 2), torch.zeros_like(kept_of(leaves, nothing, 2)))
    for upstream in (1.0, math.inf):
        for gradient in gradients(leaves, nothing, 2, upstream):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which, value", [(0, math.nan), (1, math.inf), (0, -math.inf)])
def test_what_is_no_number_shows_where_it_does_of_scores_computed_again(rng, keeping, dtype, which, value):
    leaves, labels = random_case(rng, heads=1, height=4, width=10, dtype=dtype)
    labels[labels == 255] = 1
    with torch.no_grad():
        leaves[which][1, 0, 34, 2] = value
    for ignored in (False, True):
        labels[1, 3, 4] = 255 if ignored else 1
        got, again = gradients(leaves, labels, 2), gradients(leaves, labels, 2, recompute=True)
        assert any(gradient.isnan().any() for gradient in again) == (not ignored and math.isnan(value))
        for mine, other in zip(got, again):
            assert torch.equal(mine.isnan(), other.isnan()) and torch.equal(mine.isinf(), other.isinf())
            assert relative_error(mine[mine.isfinite()], other[other.isfinite()]) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("upstream", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_upstream_gradient_that_is_no_number(rng, keeping, dtype, upstream):
    """As a loss scale that is too large makes it: it must be seen, or the step would be taken."""
    leaves, labels = random_case(rng, batch=1, heads=1, height=4, width=10, dtype=dtype)
    got = gradients(leaves, labels, 2, upstream)
    again = gradients(leaves, labels, 2, upstream, recompute=True)
    for mine, other in zip(got, again):
        assert torch.equal(mine.isfinite(), other.isfinite())
        assert bool(mine.isfinite().all()) == (upstream == 0)


# --- what is kept -----------------------------------------------------------------------------------------------------


def pairs_of_tiles(rows: int, columns: int, reach: int):
    """The tiles' numbers, row by row: each with itself, those to its right, and those below on both sides."""
    for y in range(rows):
        for x in range(columns):
            for dy in range(reach + 1):
                for dx in range(-reach if dy else 0, reach + 1):
                    if y + dy < rows and 0 <= x + dx < columns:
                        yield y * columns + x, (y + dy) * columns + x + dx


@pytest.mark.parametrize(
    "height, width, radius, dtype",
    [
        (8, 16, 3, torch.bfloat16),
        (9, 10, 4, torch.float16),
        (17, 25, 9, torch.float32),
        (1, 40, 17, torch.float32),
        (30, 5, 8, torch.float16),
        (7, 7, 30, torch.bfloat16),
    ],
)
def test_kept_are_the_derivatives_with_the_class_in_the_sign(rng, on_gpu, height, width, radius, dtype, monkeypatch):
    """Pixel by pixel of a tile and of its neighbour; 0 beyond the grid's edge, and nowhere what memory held before."""
    monkeypatch.setattr(calls, "MOST_KEPT", math.inf)
    (query, key, weight, bias), labels = random_case(rng, heads=1, height=height, width=width, depth=3, dtype=dtype)
    rows, columns = -(-height // 8), -(-width // 8)
    classes = torch.full((2, 8 * rows, 8 * columns), 255, device=DEVICE)
    classes[:, :height, :width] = labels
    z = torch.zeros(2, (8 * rows * 8 * columns), (8 * rows * 8 * columns), dtype=torch.float64, device=DEVICE)
    y, x = (part.flatten() for part in torch.meshgrid(*map(torch.arange, classes.shape[1:]), indexing="ij"))
    inside = ((y < height) & (x < width)).nonzero()[:, 0].to(DEVICE)
    maps = query[:, 0].double() @ key[:, 0].double().mT
    z[:, inside[:, None], inside] = (weight.double() * (maps + maps.mT) + bias.double()).detach()
    classes, y, x = classes.flatten(1), y.to(DEVICE), x.to(DEVICE)
    counts = (classes[:, :, None] != 255) & (classes[:, None] != 255)
    counts &= ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    signs = torch.where(classes[:, :, None] == classes[:, None], -1, 1)
    wanted = torch.where(counts, torch.sigmoid(z) * torch.sigmoid(-z) * signs, 0)
    tiles = (y // 8 * columns + x // 8).sort(stable=True).indices.view(-1, 64)  # the pixels of each
    unit, error = (1, 1e-5) if dtype == torch.float32 else (2.0**-17, 2.0**-11)
    kept = kept_of((query, key, weight, bias), labels, radius).double() * unit
    places = list(pairs_of_tiles(rows, columns, -(-min(radius, max(height, width)) // 8)))
    assert kept.shape == (2, len(places), 64, 64)
    for at, (tile, other) in enumerate(places):
        found = wanted[:, tiles[tile][:, None], tiles[other]]
        assert torch.equal(kept[:, at].sign(), found.sign())
        assert found.norm() == 0 or relative_error(kept[:, at], found) < error


@pytest.mark.skipif(DEVICE != "cpu" or not NATIVE, reason="of the CPU's kernels")
@pytest.mark.parametrize("height, width, radius", [(9, 10, 4), (2, 13, 5), (1, 6, 1), (5, 3, 30), (6, 6, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_of_the_cpu_are_those_of_each_pair_once(rng, height, width, radius, dtype, monkeypatch):
    monkeypatch.setattr(calls, "MOST_KEPT", math.inf)
    (query, key, weight, bias), labels = random_case(rng, heads=1, height=height, width=width, depth=3, dtype=dtype)
    kept = kept_of((query, key, weight, bias), labels, radius)
    reach = min(radius, max(height, width))
    assert kept.dtype == torch.float32 and kept.shape == (2, height * width, reach + 1, 2 * reach + 1)
    maps = query[:, 0].double() @ key[:, 0].double().mT
    z = (weight.double() * (maps + maps.mT) + bias.double()).detach()
    wanted, classes = torch.zeros(kept.shape, dtype=torch.float64), labels.flatten(1)
    for i, dy, dx in torch.cartesian_prod(*map(torch.arange, kept.shape[1:])).tolist():
        y, x = i // width + dy, i % width + dx - reach
        if y >= height or not 0 <= x < width or (dy == 0 and dx < reach):
            continue
        j = y * width + x
        known = (classes[:, i] != 255) & (classes[:, j] != 255)
        slope = torch.sigmoid(z[:, i, j]) * torch.sigmoid(-z[:, i, j])
        wanted[:, i, dy, dx] = torch.where(known, torch.where(classes[:, i] == classes[:, j], -slope, slope), 0)
    assert torch.equal(kept.sign(), wanted.sign()) and relative_error(kept, wanted) < 1e-5


@pytest.mark.skipif(DEVICE != "cpu" or not NATIVE, reason="of the CPU's kernels")
def test_the_same_bits_with_any_number_of_threads(rng):
    leaves, labels = random_case(rng, height=9, width=14)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([kept_of(leaves, labels, 3), *gradients(leaves, labels, 3)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


def test_the_memory_is_what_the_documents_say(on_gpu):
    labels = torch.zeros(8, 32, 32, dtype=torch.int64, device=DEVICE)
    for dtype, size in ((torch.float32, 16384), (torch.float16, 8192), (torch.bfloat16, 8192)):
        query = torch.empty(8, 1, 1024, 1, device=DEVICE, dtype=dtype)
        kept = calls.empty_derivatives(query, labels, 8, True)
        assert kept.nbytes == 8 * 58 * size
        assert f"{kept.nbytes / 1e6:.1f} MB" in attention_affinity_loss.__doc__
        wide = torch.empty(8, 16, 1024, 64, device=DEVICE, dtype=dtype)
        assert calls.empty_derivatives(wide, labels, 32, True).nbytes == 8 * 136 * size  # all pairs of 16 tiles
        assert calls.empty_derivatives(query, labels, 8, False).nbytes == 0


def test_the_memory_on_the_cpu_is_what_the_documents_say():
    query, labels = torch.empty(8, 1, 1024, 1, dtype=torch.bfloat16), torch.zeros(8, 32, 32, dtype=torch.int64)
    kept = calls.empty_derivatives(query, labels, 8, True)
    assert kept.nbytes == 8 * 1024 * 4 * 9 * 17 and "4 (r + 1) (2r + 1) bytes" in attention_affinity_loss.__doc__
    assert f"{kept.nbytes / 1e6:.1f} MB" in attention_affinity_loss.__doc__


@pytest.mark.parametrize(("channels", "widest"), [((1, 8), (21, 16)), ((16, 16), (21, 16)), ((16, 32), (31, 24))])
def test_nothing_is_kept_of_a_window_too_wide_for_its_channels(rng, keeping, channels, widest):
    """Beyond 1024 numbers a pixel and beyond four times the channels; with a GPU's tiles that is another radius."""
    heads, depth = channels
    leaves, labels = random_case(rng, heads=heads, height=3, width=60, depth=depth)
    radius = widest[0] if keeping == "float32" else widest[1]
    assert kept_of(leaves, labels, radius).numel() > 0 and kept_of(leaves, labels, radius + 1).numel() == 0
    again = gradients(leaves, labels, radius + 1, recompute=True)
    assert all(torch.equal(mine, other) for mine, other in zip(gradients(leaves, labels, radius + 1), again))


def test_what_is_kept_may_come_back_with_other_strides(rng, keeping):
    """As hooks of saved tensors may lay it out."""
    leaves, labels = random_case(rng, height=5, width=9)

    def turned(tensor):
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1) if tensor.dim() == 4 else tensor

    want = gradients(leaves, labels, 2)
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda tensor: tensor):
        got = gradients(leaves, labels, 2)
    assert all(torch.equal(mine, other) for mine, other in zip(got, want))


def test_no_number_shows_also_where_every_score_is_sure(keeping):
    """Where derivatives underflow, as float32 can tell: times no number they are none."""
    if keeping != "float32":
        pytest.skip("a GPU keeps 0 of a pair that counts for nothing, and of one whose derivative has underflown")
    leaves = [torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.ones(1), torch.full((1,), 120.0)]
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert gradients(leaves, labels, 1, math.nan)[3].isnan().all()
    assert (gradients(leaves, labels, 1)[3] == 0).all()


def test_nothing_is_kept_that_no_backward_will_ask_for(rng, keeping, monkeypatch):
    leaves, labels = random_case(rng, height=4, width=5)
    places, original = [], calls.empty_derivatives
    monkeypatch.setattr(calls, "empty_derivatives", lambda *inputs: places.append(original(*inputs)) or places[-1])

    def kept(tensors, **options):
        result = attention_affinity_loss(*tensors, labels, 2, **options)
        assert len(result) == 3
        return places.pop().numel() > 0

    quiet = [leaf.detach() for leaf in leaves]
    assert kept(leaves) and not kept(leaves, recompute=True) and not kept(quiet)
    for learned in range(4):
        assert kept([leaf.detach().requires_grad_(at == learned) for at, leaf in enumerate(leaves)])
    with torch.no_grad():
        assert not kept(leaves)
    with torch.inference_mode():
        assert not kept(leaves)


def test_the_backward_computes_no_scores(rng, keeping):
    """The bias's gradient is a sum of what was kept; of scores computed again it would follow the tensors' numbers."""
    leaves, labels = random_case(rng, height=4, width=5)
    for recompute in (False, True):
        loss = attention_affinity_loss(*leaves, labels, 2, recompute=recompute)[0]
        (wanted,) = torch.autograd.grad(loss, leaves[3:], retain_graph=True)
        leaves[3].data += 5  # past autograd, which would refuse
        (got,) = torch.autograd.grad(loss, leaves[3:])
        leaves[3].data -= 5
        assert torch.equal(got, wanted) != recompute


# --- as PyTorch asks for it -------------------------------------------------------------------------------------------


def test_a_graph_is_gone_through_twice(rng, keeping):
    leaves, labels = random_case(rng, height=9, width=10)
    loss, *counts = attention_affinity_loss(*leaves, labels, 3)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * mine, theirs) for mine, theirs in zip(first, second))
    assert not any(count.requires_grad for count in counts)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(rng, keeping, reentrant):
    leaves, labels = random_case(rng, batch=1, heads=1, height=3, width=10, dtype=torch.bfloat16)
    wanted = gradients(leaves, labels, 3)
    loss = checkpoint(lambda *x: attention_affinity_loss(*x, labels, 3)[0], *leaves, use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(leaf.grad, theirs) for leaf, theirs in zip(leaves, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_in_one_graph(rng, keeping, dtype):
    leaves, labels = random_case(rng, batch=1, heads=1, height=3, width=10, dtype=dtype)
    for recompute in (False, True):
        step = torch.compile(
            lambda *x, how=recompute: attention_affinity_loss(*x, labels, 3, recompute=how)[0],
            fullgraph=True,
            backend="aot_eager",
        )
        wanted = gradients(leaves, labels, 3, recompute=recompute)
        got = torch.autograd.grad(step(*leaves), leaves)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted))


@pytest.mark.parametrize("radius", [3, 19, 40])
def test_one_graph_for_grids_of_any_shape(rng, keeping, radius):
    """The memory's size follows from the grid's, or the radius: what is compiled must not ask which is larger."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda *x: attention_affinity_loss(*x, radius)[0], fullgraph=True, dynamic=True, backend=counting
    )
    for height, width in ((17, 20), (20, 17), (30, 18), (16, 15)):
        leaves, labels = random_case(rng, batch=1, heads=1, height=height, width=width, depth=2)
        got = torch.autograd.grad(step(*leaves, labels), leaves)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, gradients(leaves, labels, radius)))
    assert len(graphs) == 1


def test_derivatives_of_another_call_are_refused(rng, keeping):
    leaves, labels = random_case(rng, height=9, width=10)
    still = [leaf.detach() for leaf in leaves]
    counts = torch.tensor(7, device=DEVICE), torch.tensor(9, device=DEVICE)
    good = kept_of(leaves, labels, 3)
    inputs = *still, check_labels(labels, 255), torch.ones((), device=DEVICE), *counts
    for wrong in (good.half(), good[:1], good[:, :-1].contiguous(), good.mT.contiguous()[..., :-1], good[..., :-1]):
        with pytest.raises(RuntimeError, match="sizes or strides contradict each other"):
            torch.ops.afa.attention_affinity_loss_backward(*inputs, wrong, 3, -1, [True, True], "native")


@pytest.mark.parametrize("value", [1, None, "no"])
def test_recompute_is_true_or_false(rng, value):
    leaves, labels = random_case(rng, height=4, width=5)
    with pytest.raises(TypeError, match=r"^recompute must be True or False"):
        attention_affinity_loss(*leaves, labels, 2, recompute=value)


@pytest.mark.parametrize("name", [name for name in available("attention_affinity_loss") if name not in KEEPING])
def test_backends_that_keep_nothing_take_it_too(rng, name):
    leaves, labels = random_case(rng, batch=1, height=4, width=5)
    got, again = (gradients(leaves, labels, 2, backend=name, recompute=how) for how in (False, True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, again))
