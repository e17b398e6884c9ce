"""Every emulated CUDA entry point at odd shapes, in a process whose memory accesses a sanitizer checks.

Run by test_cuda_emulator_sanitizers.py with the sanitizer's runtime preloaded. NumPy alone: each array is its own
allocation, so an access one element past it is seen. ``python under_sanitizers.py address|races [fault]``. The numbers
are other tests'.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np

from build import load

SHAPES = [(1, 1, 1, 1), (2, 2, 1, 40), (1, 3, 37, 1), (3, 5, 2, 3), (1, 9, 19, 33), (2, 4, 16, 32)]
DILATIONS = [[1], [1, 2, 4, 8, 12, 24], [40, 3]]
DEVICES = {"resident": (4, 227 * 1024), "streaming": (1, 1000)}


def view(array: np.ndarray) -> tuple:
    code = {"float32": 0, "float16": 1, "uint16": 2, "int8": 1, "int16": 2, "int32": 3, "int64": 4}[array.dtype.name]
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, code, array.shape, strides


def floats(*shape: int, kind: str = "float32") -> np.ndarray:
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "uint16" else values.astype(kind)


def run_par(native, shape: tuple, dilations: list[int], kind: str, transpose: bool, flags: int, steps: tuple) -> None:
    """``flags``: bit 0 for half-precision weights, bit 1 for a class mask; ``steps``: numbers of iterations."""
    half, masked = bool(flags & 1), bool(flags & 2)
    batch, channels, height, width = shape
    images, (masks, out) = floats(batch, 3, height, width, kind=kind), (floats(*shape, kind=kind) for _ in range(2))
    present = np.arange(batch * channels, dtype=np.uint8) % 2
    factors = [0.3, 0.3, 0.01] if masked else []
    for num_iter in steps:
        size = native.par_cuda_workspace(view(images), view(masks), dilations, num_iter, transpose, half, 0)
        scratch = np.full(max(size, 1), 255, np.uint8)
        mask = present.ctypes.data if masked else 0
        options = mask, num_iter, transpose, half, (scratch.ctypes.data, scratch.nbytes), 0, 0
        native.par_cuda(view(images), view(masks), view(out), dilations, factors, *options)
    weights = floats(batch, 8 * len(dilations), height, width, kind=kind)
    native.par_weights_cuda(view(images), view(weights), dilations, factors, 0, 0)


def run_diffusion(native, shape: tuple, kind: str, transpose: bool, borders: tuple, steps: tuple) -> None:
    batch, channels, height, width = shape
    offsets = [0, 0, 1, -2, -3, 1, 0, 5, -40, 7, 3, 60, 2, 0, 0, 8]
    for zero_border in borders:
        for num_iter in steps:
            weights, masks, out = floats(batch, 8, height, width, kind=kind), floats(*shape), floats(*shape)
            size = native.diffuse_cuda_workspace(view(weights), view(masks), offsets, num_iter, transpose, 0)
            scratch = np.full(max(size, 1), 255, np.uint8)
            options = 0, num_iter, zero_border, transpose, (scratch.ctypes.data, scratch.nbytes), 0, 0
            native.diffuse_cuda(view(weights), view(masks), view(out), offsets, *options)


GRIDS = [(1, 1, 1), (3, 5, 2), (9, 8, 3), (1, 20, 9)]  # height, width, radius
KINDS = ["float32", "float16", "uint16"]  # the last as bfloat16


def scratch_of(size: int) -> np.ndarray:
    return np.full(max(size, 1), 255, np.uint8)


def run_affinity(native, grid: tuple, kind: str, depth: int) -> None:
    height, width, radius = grid
    pixels, side = height * width, 2 * radius + 1
    query, key, grad_query, grad_key = (floats(2, 3, pixels, depth, kind=kind) for _ in range(4))
    window, grad_window = (floats(2, side * side, height, width, kind=kind) for _ in range(2))
    head, grad_head, grad = (floats(3), floats(1)), (floats(3), floats(1)), floats(1)
    head, grad_head = tuple(map(view, head)), tuple(map(view, grad_head))
    numbers = (np.arange(2 * pixels) % 3 - 1).astype(("int8", "int16", "int32", "int64")[(depth + radius) % 4])
    labels = view(numbers.reshape(2, height, width)), -1
    loss, counts = floats(1), np.ones(2, np.int64)
    addresses = loss.ctypes.data, counts.ctypes.data, counts.ctypes.data + 8
    slopes = grad.ctypes.data, *addresses[1:]
    common = view(query), view(key)
    native.window_affinity_cuda(*common, *head, grid, view(window), 0, 0)
    scratch = scratch_of(native.attention_cuda_workspace(*common, grid))
    tiles, reach = list(np.ndindex(-(-height // 8), -(-width // 8))), -(-min(radius, max(height, width)) // 8)
    met = sum(one <= other and max(abs(np.subtract(one, other))) <= reach for one in tiles for other in tiles)
    derivatives = np.empty((2, met, 64, 64), "float32" if kind == "float32" else "float16")
    kept, nothing = view(derivatives), (0, 0, (1, 1, 1, 1), (1, 1, 1, 1))
    for place in (nothing, kept):
        options = *labels, addresses, place, scratch.ctypes.data, 0, 0
        native.attention_affinity_loss_cuda(*common, *head, grid, *options)
    scratch = scratch_of(native.attention_backward_cuda_workspace(*common, grid, 0))
    gradients = view(grad_query), view(grad_key), *grad_head, scratch.ctypes.data, 0, 0
    for name, source in (
        ("attention_affinity_loss", (*labels, slopes, nothing)),
        ("attention_affinity_loss", (*labels, slopes, kept)),
        ("window_affinity", (view(grad_window),)),
    ):
        getattr(native, f"{name}_backward_cuda")(*common, *head, grid, *source, *gradients)
    maps, grad_maps = (floats(2, 3, pixels, pixels, kind=kind) for _ in range(2))
    native.affinity_from_maps_cuda(view(maps), *head, grid, view(window), 0, 0)
    scratch = scratch_of(native.affinity_from_maps_backward_cuda_workspace(view(maps), grid))
    gradients = view(grad_maps), *grad_head, scratch.ctypes.data, 0, 0
    native.affinity_from_maps_backward_cuda(view(maps), *head, grid, view(grad_window), *gradients)
    scratch = scratch_of(native.affinity_loss_cuda_workspace(view(window)))
    native.affinity_loss_cuda(view(window), *labels, radius, addresses, scratch.ctypes.data, 0, 0)
    native.affinity_loss_backward_cuda(view(grad_window), *labels, radius, slopes, 0, 0)


def run_walk(native, grid: tuple, kind: str, transpose: bool) -> None:
    height, width, radius = grid
    affinity, grad_affinity = (floats(2, (2 * radius + 1) ** 2, height, width, kind=kind) for _ in range(2))
    cams, out = (floats(2, 3, height, width, kind=kind) for _ in range(2))
    present = np.arange(6, dtype=np.uint8) % 2
    for num_steps in (0, 1, 2):
        size = native.random_walk_cuda_workspace(view(affinity), view(cams), radius, num_steps, transpose, 0)
        scratch = scratch_of(size)
        place = scratch.ctypes.data, scratch.nbytes
        options = radius, 2.0, 0.1, present.ctypes.data, num_steps, transpose, place, 0, 0
        native.random_walk_cuda(view(affinity), view(cams), view(out), *options)
    scratch = scratch_of(native.random_walk_affinity_gradient_cuda_workspace(view(affinity), radius))
    options = radius, 2.0, 0.1, scratch.ctypes.data, 0, 0
    native.random_walk_affinity_gradient_cuda(view(affinity), view(cams), view(out), view(grad_affinity), *options)


def run_path(native, grid: tuple, kind: str) -> None:
    height, width, radius = grid
    edge, grad_edge = (floats(2, 1, height, width, kind=kind) for _ in range(2))
    for reach in (radius - 1, radius):  # without the ring that is outside of the disc, and with it
        window = np.zeros((2, (2 * reach + 1) ** 2, height, width), edge.dtype)
        inputs = view(edge), view(window), radius, reach
        native.path_affinity_cuda(*inputs, 0, 0)
        scratch = scratch_of(native.path_affinity_gradient_cuda_workspace(*inputs))
        native.path_affinity_gradient_cuda(*inputs, view(grad_edge), scratch.ctypes.data, 0, 0)


def run_feature_affinity(native, grid: tuple, dtype: str, kind: int) -> None:
    """Channels of two parts and a half, forward with slopes, and backward."""
    height, width, radius = grid
    taps = (2 * radius + 1) ** 2
    features, grad_features = (floats(2, 37, height, width, kind=dtype) for _ in range(2))
    out, slopes = (floats(2, count, height, width, kind=dtype) for count in (taps, (taps + 1) // 2))
    kept = None if kind == 2 else view(slopes)
    native.feature_affinity_cuda(view(features), radius, kind, view(out), kept, 0, 0)
    scratch = scratch_of(native.feature_affinity_backward_cuda_workspace(view(features), radius, kind))
    options = view(slopes), view(out), view(grad_features), scratch.ctypes.data, 0, 0
    native.feature_affinity_backward_cuda(view(features), radius, kind, *options)


def run_sinkhorn(native, grid: tuple, kind: str, symmetric: bool) -> None:
    height, width, radius = grid
    affinity, grad, out = (floats(2, (2 * radius + 1) ** 2, height, width, kind=kind) for _ in range(3))
    for num_iter in (0, 2):
        scales = np.zeros((2, 2 * num_iter, height, width))
        options = radius, num_iter, 0.1, symmetric
        native.sinkhorn_cuda(view(affinity), view(out), scales.ctypes.data, *options, 0, 0)
        scratch = scratch_of(native.sinkhorn_gradient_cuda_workspace(view(affinity), radius, num_iter))
        place = *options, scratch.ctypes.data, 0, 0
        native.sinkhorn_gradient_cuda(view(affinity), scales.ctypes.data, view(grad), view(out), *place)


CLOUDS = [(1, 1, 1, 1), (7, 3, 1, 5), (90, 2, 2, 21), (130, 5, 1, 5), (6, 5, 2, 130)]  # points, dims, images, channels


def run_lattice(native, cloud: tuple, transpose: bool, turn: int | None) -> None:
    """Build, weigh, and a step of each kind, with a matrix and without: each of them so, or by turns, 0 and then 1."""
    points, dims, images, channels = cloud
    points -= points % images
    features, factor, row = 4 * floats(points, dims), floats(points), (channels + 3) // 4 * 4
    features[: points // 2] = features[0]
    memory = scratch_of(native.lattice_cuda_bytes(points, dims))
    scratch = scratch_of(native.lattice_build_cuda_workspace(points, dims))
    place = memory.ctypes.data, scratch.ctypes.data, 0, 0
    native.lattice_build_cuda(features.ctypes.data, points, dims, images, *place)
    weighed = np.zeros((points * (dims + 1), 2), np.int32)
    native.lattice_weigh_cuda(points, dims, memory.ctypes.data, factor.ctypes.data, weighed.ctypes.data, 0, 0)
    plain = points, dims, memory.ctypes.data, 0, 1.5, 0
    kernels = [plain, (*plain[:3], weighed.ctypes.data, 0.5, factor.ctypes.data)]
    scratch = scratch_of(native.dense_crf_cuda_workspace(kernels, points, channels))
    rows = [floats(points, row) for _ in range(7)]
    source, near, base, q, out, logits, total = (array.ctypes.data for array in rows)
    matrix = floats(row, row)
    mixings = 0, matrix.ctypes.data
    for finish, at in itertools.product(range(3), range(2)):
        if turn not in (None, (finish + at) % 2):
            continue
        given = source, near, base, mixings[at], q, out, logits, total
        native.dense_crf_cuda(kernels, points, channels, given, transpose, finish, scratch.ctypes.data, 0, 0)


def run_sort(native, count: int, bits: int) -> None:
    keys, out = (np.random.default_rng(0).integers(0, 1 << bits, count, dtype=np.uint32) for _ in range(2))
    payload, moved = np.zeros(count, np.int32), np.zeros(count, np.int32)
    scratch = scratch_of(native.radix_sort_cuda_workspace(count))
    arrays = [array.ctypes.data for array in (keys, payload, out, moved)]
    native.radix_sort_cuda(arrays, count, bits, scratch.ctypes.data, 0, 0)


def run_features(native, shape: tuple, kind: str) -> None:
    images = floats(shape[0], 3, *shape[2:], kind=kind)
    for dims in (2, 5):
        features = floats(images[:, 0].size, dims)
        native.lattice_features_cuda(view(images), 9.0 * (dims == 5), 2.0, features.ctypes.data, 0, 0)


def run_bilateral(native, shape: tuple, kind: str) -> None:
    batch, channels, height, width = shape
    images, (values, out) = 255 * floats(batch, 3, height, width), (floats(*shape, kind=kind) for _ in range(2))
    values[0, 0, 0, 0] = 32640 if kind == "uint16" else np.inf  # in the bits of bfloat16
    counted = np.zeros(2, np.int64)
    scratch = scratch_of(native.bilateral_filter_cuda_workspace(view(images), view(values), 0))
    options = 0.5 / 60**2, 0.5 / 4**2, counted.ctypes.data, scratch.ctypes.data, 0, 0
    native.bilateral_filter_cuda(view(images), view(values), view(out), *options)
    scratch = scratch_of(native.gaussian_cuda_workspace(view(values), 1.5))
    native.gaussian_cuda(view(values), view(out), 1.5, scratch.ctypes.data, 0, 0)


def run_pcm(native, shape: tuple, kind: str, ones: bool) -> None:
    batch, classes, height, width = shape
    values, features, gradient = (floats(batch, c, height, width, kind=kind) for c in (classes, 67, 67))
    sums = floats(batch, classes + ones, height, width)
    tensors = view(values), view(features), view(sums)
    scratch = scratch_of(native.pcm_cuda_workspace(*tensors, 0))
    native.pcm_cuda(*tensors, scratch.ctypes.data, 0, 0)
    tensors = view(sums), view(values), view(features), view(gradient)
    scratch = scratch_of(native.pcm_features_gradient_cuda_workspace(*tensors, 0))
    native.pcm_features_gradient_cuda(*tensors, scratch.ctypes.data, 0, 0)


def main(sanitizer: str, fault: str | None = None) -> None:
    emulator = load(sanitizer)
    if fault is not None:
        out = np.zeros(64, np.float32)
        print(f"{fault}: {emulator.fault(fault, out.ctypes.data) or 'unnoticed'}")
        return
    # Accesses: everything. Races, where each thread is a fiber: images of several blocks with an edge in each, and what
    # does not change which thread touches what by turns.
    races = sanitizer == "races"
    shapes = SHAPES[-2:] if races else SHAPES
    kinds = KINDS[:2] if races else KINDS
    calls = 0
    for order, device in enumerate(DEVICES.values()):
        emulator.set_order(order)
        emulator.set_device(*device)
        for shape, transpose, kind in itertools.product(shapes, (False, True), kinds):
            dilations, turn = DILATIONS[calls % 3], calls % 2 == 1
            borders, steps = ((turn,), (3,)) if races else ((False, True), (0, 1, 3))
            run_diffusion(emulator.native, shape, kind, transpose, borders, steps)
            steps = (1 + 2 * turn,) if races else (0, 1, 2, 4)
            run_par(emulator.native, shape, dilations, kind, transpose, (calls + calls // 4) % 4, steps)
            calls += 1
        run_bilateral(emulator.native, SHAPES[-2 + order], kinds[order])
        run_pcm(emulator.native, (2, 3, 7, 13), kinds[order], ones=bool(order))
        for turn, grid in enumerate([(5, 13, 2)] if races else GRIDS):
            # Rows of 8 numbers are loaded otherwise than rows of 5; both in every type, but not on every grid, and the
            # widest window, which takes as long as all else, in one.
            for kind in kinds if order == 0 and grid[2] < 9 else kinds[turn % len(kinds) :][:1]:
                run_affinity(emulator.native, grid, kind, depth=(8, 5)[order])
            run_feature_affinity(emulator.native, grid, kinds[turn % len(kinds)], turn % 3)
            for kind in kinds:
                run_walk(emulator.native, grid, kind, transpose=bool(order))
                run_sinkhorn(emulator.native, grid, kind, symmetric=bool(order))
        for grid, kind in zip([(5, 33, 3)] if races else [*GRIDS[1:], (18, 33, 4)], kinds[::-1] + kinds):
            run_path(emulator.native, grid, kind)
        for turn, cloud in enumerate(CLOUDS[3:] if races else CLOUDS):
            run_lattice(emulator.native, cloud, transpose=bool(order + turn & 1), turn=order if races else None)
        for count, bits in ((9001, 9),) if races else ((1, 1), (4097, 32), (9001, 9)):
            run_sort(emulator.native, count, bits)
        for shape, kind in itertools.product(shapes, kinds):
            run_features(emulator.native, shape, kind)
    print(f"clean after {len(emulator.launches())} launches")


if __name__ == "__main__":
    main(*sys.argv[1:])
