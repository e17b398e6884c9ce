"""Affinity along straight paths and what is spread along it: IRN's definitions written out, bad input, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import DEVICE, available, relative_error
from support.running import EMULATED_CHIPS, running

import afa_kernels
from afa_kernels import path_affinity, propagate_to_edge, use_backend
from afa_kernels.ops.path_affinity import native as path_native
from afa_kernels.ops.path_affinity.reference import path

BACKENDS = available("path_affinity")


@pytest.fixture(params=[*BACKENDS, *EMULATED_CHIPS])
def backend(request):
    with running(request.param) as name:
        yield name


def interpreted_at_length(backend, large: bool) -> None:
    if DEVICE == "cpu" and backend == "triton" and large:
        pytest.skip("Triton's interpreter takes too long for it; smaller images and windows take the same path")


def random_edge(rng, batch=2, height=7, width=10, dtype=torch.float32):
    return torch.rand(batch, 1, height, width, generator=rng).to(DEVICE, dtype)


# --- IRN's definitions, pair by pair ----------------------------------------------------------------------------------


def search_paths(radius: int) -> list[list[tuple[int, int]]]:
    """IRN's directions in its order and their paths: the last point of each list is the pixel itself, or as near to it
    as any other point.
    """
    found = [(0, x) for x in range(1, radius)]
    found += [(y, x) for y in range(1, radius) for x in range(1 - radius, radius) if x * x + y * y < radius**2]
    paths = []
    for y, x in found:
        rows, columns = range(min(0, y), max(0, y) + 1), range(min(0, x), max(0, x) + 1)
        near = [(py, px) for py in rows for px in columns if (y * px - x * py) ** 2 / (y**2 + x**2) < 1]
        paths.append(sorted(near, key=lambda point: -abs(point[0]) - abs(point[1])))
    return paths


def ends(points, height, width):
    """The pixels that the paths of one direction start from and lead to, and their points: [n], [n], [points, n]."""
    (dy, dx), numbers = points[0], torch.arange(height * width).view(height, width)
    left, right = max(0, -dx), max(0, dx)
    here = [numbers[py : height - dy + py, left + px : width - right + px].flatten() for py, px in [(0, 0), *points]]
    return here[0], here[1], torch.stack(here[1:])


def dense_affinity(edge: torch.Tensor, radius: int) -> torch.Tensor:
    """[B, 1, H, W] -> [B, N, N] in float64: 1 - the maximum over the path of each pair, the diagonal 1."""
    batch, _, height, width = edge.shape
    flat, dense = edge.flatten(1).double().cpu(), torch.eye(height * width, dtype=torch.float64).repeat(batch, 1, 1)
    for points in search_paths(radius):
        if points[0][0] < height and abs(points[0][1]) < width:
            start, end, on_path = ends(points, height, width)
            dense[:, start, end] = dense[:, end, start] = 1 - flat[:, on_path].amax(1)
    return dense.to(edge.device)


def dense_propagation(cams, edge, radius, beta, exp_times):
    """IRN's matrices in float64: the affinity to its power, columns normalised, squared, the maps times it."""
    matrix = dense_affinity(edge, radius) ** beta
    matrix = matrix / matrix.sum(1, keepdim=True)
    for _ in range(exp_times):
        matrix = matrix @ matrix
    start = (cams.double() * (1 - edge.double())).flatten(2)
    return (start @ matrix).view(cams.shape)


# --- the window -------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 1, 4), (2, 3, 1), (3, 9, 4), (9, 3, 5), (1, 17, 3), (23, 1, 6), (5, 4, 12), (19, 37, 5)]


@pytest.mark.parametrize("height, width, radius", SHAPES)
def test_window_against_pairs(rng, backend, height, width, radius):
    interpreted_at_length(backend, height * width > 100 or radius > 5)
    edge = random_edge(rng, height=height, width=width)
    got = path_affinity(edge, radius)
    assert got.shape == (2, (2 * radius + 1) ** 2, height, width)
    wanted = afa_kernels.dense_to_window(dense_affinity(edge, radius), height, width, radius)
    assert torch.equal(got, wanted.float())  # 1 - a float32 is rounded once, either way


@pytest.mark.parametrize("radius", [1, 2, 5, 11])
def test_the_paths_are_irns(radius):
    """Of the reference, which the kernels are compared with: the same points in the same order."""
    for points in search_paths(radius):
        assert path(*points[0]) == points


def test_both_ends_see_the_same_bits(rng, backend):
    edge = random_edge(rng, 1, 6, 9)
    dense = afa_kernels.window_to_dense(path_affinity(edge, 4), 4)
    assert torch.equal(dense, dense.transpose(1, 2)) and (dense.diagonal(dim1=1, dim2=2) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rng, backend, dtype):
    edge = random_edge(rng, 1, 6, 9, dtype)
    got = path_affinity(edge, 4)
    assert got.dtype == dtype and torch.equal(got, path_affinity(edge.double(), 4, backend="reference").to(dtype))


def test_values_of_any_sign_infinite_or_not_at_all(rng, backend):
    edge = 4 * random_edge(rng, 1, 6, 9) - 2
    edge[0, 0, 2, 3], edge[0, 0, 4, 7], edge[0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    edge[0, 0, 5, :5] = torch.tensor([0.0, -0.0, -torch.inf, -torch.inf, -torch.nan])
    got, wanted = path_affinity(edge, 4), path_affinity(edge, 4, backend="reference")
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))
    dense = afa_kernels.window_to_dense(got, 4)[0]
    assert dense[2 * 9 + 1, 2 * 9 + 4].isnan() and dense[2 * 9, 2 * 9 + 2] == 1 - edge[0, 0, 2, :3].max()


# --- gradients --------------------------------------------------------------------------------------------------------


def gradient(edge, radius, grad, backend=None):
    leaf = edge.detach().clone().requires_grad_()
    return torch.autograd.grad(path_affinity(leaf, radius, backend=backend), leaf, grad)[0]


SIZES = [(1, 1, 3), (3, 9, 1), (3, 9, 4), (9, 3, 12), (1, 17, 3), (19, 37, 5)]


@pytest.mark.parametrize("height, width, radius", SIZES)
def test_gradients_against_the_reference(rng, backend, height, width, radius):
    interpreted_at_length(backend, height * width > 100 or radius > 5)
    edge = random_edge(rng, height=height, width=width)
    grad = torch.randn(2, (2 * radius + 1) ** 2, height, width, generator=rng).to(DEVICE)
    wanted = gradient(edge.double(), radius, grad.double(), "reference")
    assert relative_error(gradient(edge, radius, grad), wanted) < 1e-5


def pooled(edge: torch.Tensor, radius: int, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of max pooling over IRN's lists of points, in float64."""
    leaf = edge.detach().double().cpu().requires_grad_()
    height, width = edge.shape[2:]
    side, total = 2 * radius + 1, 0.0
    for points in search_paths(radius):
        dy, dx = points[0]
        left, right = max(0, -dx), min(width, width - dx)
        if height <= dy or right <= left:
            continue
        lists = [leaf[:, :, py : py + height - dy, left + px : right + px].flatten(2) for py, px in points]
        affinity = 1 - F.max_pool2d(torch.stack(lists, 2), (len(points), 1)).view(-1, height - dy, right - left)
        taps = grad.double().cpu().unflatten(1, (side, side))
        own = taps[:, radius + dy, radius + dx, : height - dy, left:right]
        other = taps[:, radius - dy, radius - dx, dy:, left + dx : right + dx]
        total = total + (affinity * (own + other)).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("levels", [1, 3])
def test_at_ties_the_first_point_of_irns_pooling_has_the_gradient(rng, backend, levels):
    edge = (random_edge(rng, 1, 6, 11) * levels).floor()
    grad = torch.randn(1, 49, 6, 11, generator=rng).to(DEVICE)
    assert relative_error(gradient(edge, 3, grad), pooled(edge, 3, grad)) < 1e-6


def test_both_zeros_are_one_value(rng, backend):
    edge = torch.zeros(1, 1, 5, 8, device=DEVICE)
    signs = torch.where(random_edge(rng, 1, 5, 8) < 0.5, -0.0, 0.0)
    grad = torch.randn(1, 49, 5, 8, generator=rng).to(DEVICE)
    assert torch.equal(gradient(edge, 3, grad), gradient(signs, 3, grad))


def test_the_first_nan_of_a_path_has_the_gradient(rng, backend):
    edge = random_edge(rng, 1, 5, 8)
    edge[0, 0, 1:3, 2:6] = torch.nan
    grad = torch.randn(1, 49, 5, 8, generator=rng).to(DEVICE)
    assert relative_error(gradient(edge, 3, grad), gradient(edge, 3, grad, "reference")) < 1e-6


def test_taps_without_a_path_have_no_gradient(rng, backend):
    edge = random_edge(rng, 1, 4, 6)
    grad = torch.randn(1, 49, 4, 6, generator=rng).to(DEVICE)
    inside = path_affinity(torch.zeros_like(edge), 3) > 0
    inside[:, 24] = False
    poisoned = torch.where(inside, grad, torch.nan)
    assert torch.equal(gradient(edge, 3, grad), gradient(edge, 3, poisoned))


@pytest.mark.parametrize("kernels", ["native"] * ("native" in BACKENDS) + EMULATED_CHIPS[:1])
def test_paths_of_more_points_than_a_byte_counts(rng, kernels):
    """Along a row that falls in steps, where the first of the largest is the second to last or the last."""
    width = 270
    edge = (torch.arange(width, 0, -1.0) // 2).view(1, 1, 1, width).to(DEVICE)
    grad = torch.randn(width, generator=rng).to(DEVICE)
    wanted = torch.zeros(width, dtype=torch.float64, device=DEVICE)
    for dx in range(1, width):
        start = torch.arange(width - dx, device=DEVICE)
        first = start + dx - edge.flatten().unfold(0, dx + 1, 1).flip(1).argmax(1)
        wanted.index_add_(0, first, -(grad[: width - dx] + grad[dx:]).double())
    taps = grad.expand(1, (2 * width + 1) ** 2, 1, -1)  # of which most are not there, and none are written
    with running(kernels) as name:
        got = torch.ops.afa.path_affinity_gradient(edge, taps, width, width, name)
    assert relative_error(got.flatten(), wanted) < 1e-5


# --- propagation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, radius, beta, exp_times",
    [(13, 17, 5, 10, 8), (20, 24, 5, 10, 8), (5, 6, 3, 4, 3), (9, 4, 8, 2.5, 2), (3, 5, 1, 10, 8), (6, 7, 2, 8, 0)],
)
def test_propagation_against_matrices(rng, backend, height, width, radius, beta, exp_times):
    interpreted_at_length(backend, height * width > 100 or radius > 5)
    edge, cams = random_edge(rng, 1, height, width), torch.rand(1, 3, height, width, generator=rng).to(DEVICE)
    got = propagate_to_edge(cams, edge, radius, beta, exp_times)
    assert relative_error(got, dense_propagation(cams, edge, radius, beta, exp_times)) < 1e-4


def test_without_a_batch_as_irn_calls_it(rng, backend):
    edge, cams = random_edge(rng, 1, 5, 6), torch.rand(1, 3, 5, 6, generator=rng).to(DEVICE)
    got = propagate_to_edge(cams[0], edge[0], 3, 4, 2)
    assert got.shape == (3, 1, 5, 6)
    assert torch.equal(got[:, 0], propagate_to_edge(cams, edge, 3, 4, 2)[0])


def test_the_defaults_are_irns(rng):
    edge, cams = random_edge(rng, 1, 6, 8), torch.rand(1, 2, 6, 8, generator=rng).to(DEVICE)
    assert torch.equal(propagate_to_edge(cams, edge), propagate_to_edge(cams, edge, radius=5, beta=10, exp_times=8))


def test_propagation_has_gradients_in_both(rng, backend):
    edge, cams = random_edge(rng, 1, 4, 5), torch.rand(1, 2, 4, 5, generator=rng).to(DEVICE)
    leaves = [cams.requires_grad_(), edge.requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grad = torch.randn(1, 2, 4, 5, generator=rng).to(DEVICE)
    got = torch.autograd.grad(propagate_to_edge(*leaves, 2, 4, 1), leaves, grad)
    with use_backend("reference"):
        wanted = torch.autograd.grad(propagate_to_edge(*wide, 2, 4, 1), wide, grad.double())
    for mine, theirs in zip(got, wanted):
        assert relative_error(mine, theirs) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_propagation_in_half_precision_errs_as_its_input_and_output_do(rng, backend, dtype):
    edge, cams = random_edge(rng, 1, 5, 6, dtype), torch.rand(1, 3, 5, 6, generator=rng).to(DEVICE, dtype)
    wanted = dense_propagation(cams, edge, 3, 10, 3)
    got, mixed = propagate_to_edge(cams, edge, 3, 10, 3), propagate_to_edge(cams.float(), edge, 3, 10, 3)
    assert got.dtype == dtype and relative_error(got, wanted) < torch.finfo(dtype).eps
    assert mixed.dtype == torch.float32 and relative_error(mixed, wanted) < 1e-5


def test_irns_training_pairs_are_read_out_of_the_window(rng, backend):
    """`to_affinity`: groups of paths by their number of points; in each, pairs whose whole half disc fits."""
    radius, height, width = 4, 9, 12
    edge = random_edge(rng, 1, height, width)
    window = path_affinity(edge, radius)[0].unflatten(0, (2 * radius + 1, 2 * radius + 1))
    groups: dict[int, list] = {}
    for points in search_paths(radius):
        groups.setdefault(len(points), []).append(points)
    rows, columns = height - radius + 1, width - 2 * (radius - 1)
    flat = edge.flatten().double().cpu()
    numbers = torch.arange(height * width).view(height, width)
    for length, paths in sorted(groups.items()):
        starts = [[numbers[py:, radius - 1 + px :][:rows, :columns] for py, px in points] for points in paths]
        index = torch.stack([torch.stack([start.flatten() for start in start_of]) for start_of in starts])
        pairs = 1 - flat[index].amax(1)  # [paths of the group, pixels], by index_select and max as IRN
        assert index.shape[1] == length
        read = [window[radius + p[0][0], radius + p[0][1], :rows, radius - 1 : width - radius + 1] for p in paths]
        assert torch.equal(torch.stack(read).flatten(1).cpu(), pairs.float())


# --- types, modes, bad input ------------------------------------------------------------------------------------------


def test_any_stride_autocast_same_bits_inputs_untouched(rng, backend):
    edge, grad = random_edge(rng, height=5, width=7), torch.randn(2, 25, 5, 7, generator=rng).to(DEVICE)
    copy, wanted, slope = edge.clone(), path_affinity(edge, 2), gradient(edge, 2, grad)
    turned = edge.transpose(2, 3).contiguous().transpose(2, 3)
    spaced = torch.stack([edge, torch.full_like(edge, torch.nan)], -1)[..., 0]
    for layout in (edge, turned, spaced, edge.flip(3).contiguous().flip(3), edge[:1].expand(2, -1, -1, -1)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = path_affinity(layout, 2)
        assert torch.equal(got, wanted if layout.shape[0] == 2 and layout.stride(0) else wanted[:1].expand_as(got))
    last = grad.to(memory_format=torch.channels_last)
    assert torch.equal(gradient(turned, 2, last), slope) and torch.equal(gradient(edge, 2, grad), slope)
    assert torch.equal(edge, copy)


def test_an_image_does_not_hear_of_the_others(rng, backend):
    edge, grad = random_edge(rng, 3, 5, 7), torch.randn(3, 25, 5, 7, generator=rng).to(DEVICE)
    alone = path_affinity(edge[1:2], 2), gradient(edge[1:2], 2, grad[1:2])
    assert torch.equal(path_affinity(edge, 2)[1:2], alone[0]) and torch.equal(gradient(edge, 2, grad)[1:2], alone[1])


@pytest.mark.parametrize("kernels", ["native"] * ("native" in BACKENDS) + EMULATED_CHIPS[:2])
def test_what_scratch_memory_held_plays_no_part(rng, kernels, monkeypatch):
    """Neither NaN nor 255, but numbers of points and slopes that are as good as any other."""
    edge, grad = random_edge(rng, 2, 5, 7), torch.randn(2, 49, 5, 7, generator=rng).to(DEVICE)
    wanted, alike = gradient(edge, 3, grad, "reference"), torch.tensor([0, 1, 2, 0x41], dtype=torch.uint8)

    def used(size: int, device: torch.device) -> torch.Tensor:
        return alike[torch.randint(4, (max(size, 1),), generator=rng)].to(device)

    monkeypatch.setattr(path_native, "workspace", used)
    with running(kernels):
        assert relative_error(gradient(edge, 3, grad), wanted) < 1e-6


@pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="no native CPU kernels")
def test_any_number_of_threads_gives_the_same_bits(rng):
    edge, grad = random_edge(rng, height=19, width=33), torch.randn(2, 121, 19, 33, generator=rng)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((path_affinity(edge, 5, backend="native"), gradient(edge, 5, grad, "native")))
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0]))


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("edge", torch.ones(1, 3, 4), ValueError),
        ("edge", torch.ones(1, 2, 3, 4), ValueError),
        ("edge", torch.ones(1, 1, 0, 4), ValueError),
        ("edge", torch.ones(1, 1, 3, 4, dtype=torch.int64), TypeError),
        ("edge", None, TypeError),
        ("radius", 0, ValueError),
        ("radius", 2.0, TypeError),
        ("radius", 2**70, ValueError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    case = {"edge": torch.ones(1, 1, 3, 4), "radius": 2}
    with pytest.raises(error, match=f"^{argument}"):
        path_affinity(**{**case, argument: value})


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("cams", torch.ones(2, 3, 4, 5, 6), ValueError),
        ("cams", torch.ones(3, 4), ValueError),
        ("cams", torch.ones(1, 2, 3, 4, dtype=torch.int64), TypeError),
        ("cams", None, TypeError),
        ("edge", torch.ones(2, 1, 3, 4), ValueError),
        ("edge", torch.ones(1, 2, 3, 4), ValueError),
        ("edge", torch.ones(1, 1, 4, 3), ValueError),
        ("edge", torch.ones(1, 3, 4), ValueError),
        ("edge", torch.ones(1, 1, 3, 4, device="meta"), ValueError),
        ("radius", 0, ValueError),
        ("beta", 0, ValueError),
        ("beta", "10", TypeError),
        ("exp_times", -1, ValueError),
        ("exp_times", 31, ValueError),
        ("exp_times", 8.0, TypeError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_of_propagation(argument, value, error):
    case = {"cams": torch.ones(1, 2, 3, 4), "edge": torch.ones(1, 1, 3, 4)}
    with pytest.raises(error, match=f"^{argument}"):
        propagate_to_edge(**{**case, argument: value})
    if argument == "edge" and value.dim() == 3:
        with pytest.raises(error, match=r"^edge"):
            propagate_to_edge(torch.ones(2, 3, 4), torch.ones(1, 1, 3, 4))


def test_gradcheck_of_the_reference(rng):
    edge = random_edge(rng, 1, 3, 4, torch.float64).requires_grad_()
    cams = torch.rand(1, 2, 3, 4, generator=rng).to(DEVICE, torch.float64).requires_grad_()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda e: path_affinity(e, 3), [edge])
        assert torch.autograd.gradcheck(lambda c, e: propagate_to_edge(c, e, 3, 3, 1), [cams, edge])


def test_compiles_in_one_graph(rng, backend):
    edge = random_edge(rng, 1, 3, 4).requires_grad_()
    cams = torch.rand(1, 2, 3, 4, generator=rng).to(DEVICE).requires_grad_()

    def step(cams, edge):
        return propagate_to_edge(cams, edge, 2, 4, 1) + path_affinity(edge, 2)[:, :2]

    got, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(cams, edge), step(cams, edge)
    assert relative_error(got, wanted) < 1e-5
    grad = torch.randn(got.shape, generator=rng).to(DEVICE)
    leaves = cams, edge
    for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend_name", [name for name in BACKENDS if name != "reference"])
def test_operators_are_registered_right(rng, backend_name):
    """Schema, fake tensors, autograd and tracing of the operator and its gradient, of both windows."""
    edge = random_edge(rng, 1, 3, 4)
    for reach in (1, 2) if backend_name == "native" else (2,):
        leaf = edge.clone().requires_grad_()
        torch.library.opcheck(torch.ops.afa.path_affinity.default, (leaf, 2, reach, backend_name))
        grad = torch.randn(1, (2 * reach + 1) ** 2, 3, 4, generator=rng).to(DEVICE)
        torch.library.opcheck(torch.ops.afa.path_affinity_gradient.default, (edge, grad, 2, reach, backend_name))
