"""The native kernels of the bilateral filter, called: the ``native`` backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import address, native, view, workspace
from . import native_cuda

LARGEST_SCALE = 1e30  # of squares: 0 times infinity would be NaN for a pixel with itself


def bilateral_filter(
    images: Tensor, values: Tensor, sigma_rgb: float | None, sigma_xy: float, method: str, transpose: bool
) -> Tensor:
    if native_module.on_cuda(values):
        return _on_cuda(images, values, sigma_rgb, sigma_xy, method, transpose)
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    threads = torch.get_num_threads()
    if method == "lattice":
        for image, value, to in zip(images, values.split(1), out.split(1)):
            _filter(_of_pixels(image, sigma_rgb, sigma_xy), value, to, transpose)
    elif sigma_rgb is None:
        scratch = workspace(native.gaussian_cpu_workspace(view(values), sigma_xy, threads), values.device)
        native.gaussian_cpu(view(values), view(out), sigma_xy, scratch.data_ptr(), threads)
    else:
        tensors = view(images), view(values)
        scratch = workspace(native.bilateral_filter_cpu_workspace(*tensors, threads), values.device)
        native.bilateral_filter_cpu(*tensors, view(out), *_scales(sigma_rgb, sigma_xy), scratch.data_ptr(), threads)
    return out


def _on_cuda(
    images: Tensor, values: Tensor, sigma_rgb: float | None, sigma_xy: float, method: str, transpose: bool
) -> Tensor:
    if method == "lattice":
        return native_cuda.bilateral_filter(images, values, sigma_rgb, sigma_xy, transpose)
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    place = native_module.cuda_stream(values.device)
    if sigma_rgb is None:
        scratch = workspace(native.gaussian_cuda_workspace(view(values), sigma_xy), values.device)
        native.gaussian_cuda(view(values), view(out), sigma_xy, scratch.data_ptr(), *place)
        return out
    tensors = view(images), view(values)
    scratch = workspace(native.bilateral_filter_cuda_workspace(*tensors, place[0]), values.device)
    native.bilateral_filter_cuda(*tensors, view(out), *_scales(sigma_rgb, sigma_xy), 0, scratch.data_ptr(), *place)
    return out


def _scales(sigma_rgb: float, sigma_xy: float) -> list[float]:
    """What squares are multiplied with."""
    return [min(0.5 / sigma / sigma, LARGEST_SCALE) for sigma in (sigma_rgb, sigma_xy)]


def dense_crf(
    images: Tensor,
    unary: Tensor,
    num_iter: int,
    kernels: list[tuple[float, float, float | None]],
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
    convergence: bool,
) -> tuple[Tensor, Tensor]:
    if native_module.on_cuda(unary):
        options = kernels, compat, method, normalization, tolerance, convergence, bilateral_filter
        return native_cuda.dense_crf(images, unary, num_iter, *options)
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    divergences = torch.zeros(len(unary), num_iter + 1 if convergence else 0, dtype=torch.float64, device="cpu")
    for b, energy in enumerate(unary.split(1)):
        step = _step(images[b : b + 1], energy, kernels, compat, method, normalization)
        _, found = _run(step, num_iter, tolerance, convergence, out[b : b + 1])
        divergences[b] = torch.tensor(found, dtype=torch.float64, device="cpu")
    return out, divergences


def dense_crf_gradient(
    images: Tensor,
    unary: Tensor,
    grad: Tensor,
    num_iter: int,
    kernels: list[tuple[float, float, float | None]],
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
) -> Tensor:
    """The gradient of unary: the distributions of all iterations are made again, then met in reverse."""
    if native_module.on_cuda(unary):
        options = kernels, compat, method, normalization, tolerance, bilateral_filter
        return native_cuda.dense_crf_gradient(images, unary, grad, num_iter, *options)
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    for b, energy in enumerate(unary.split(1)):
        step = _step(images[b : b + 1], energy, kernels, compat, method, normalization)
        met, _ = _run(step, num_iter, tolerance, False)
        slope, total = grad[b : b + 1].float(), torch.zeros(energy.shape, device="cpu")
        for left in range(len(met) - 1, -1, -1):
            logits = met[left] * (slope - (met[left] * slope).sum(1, keepdim=True))
            total -= logits
            if left:
                slope = step.message(logits, True)
        out[b : b + 1] = total
    return out


def lattice(features: Tensor, shape: tuple[int, int] | None = None) -> _Lattice | native_cuda.Lattice:
    """features [N, d], of an image of ``shape`` row by row, or of anything -> what `filter_lattice` takes."""
    features = features.contiguous()
    if native_module.on_cuda(features):
        return native_cuda.lattice(features)
    points, dims = features.shape
    return _build((features.data_ptr(), dims, 1, 1.0, 0.0), (*(shape or (points, 1)), dims))


def filter_lattice(lattice: _Lattice | native_cuda.Lattice, values: Tensor) -> Tensor:
    """values [1, K, H, W] float32 of the lattice's shape -> the same."""
    if native_module.on_cuda(values):
        return native_cuda.filter_lattice(lattice, values)
    return _filter(lattice, values, torch.empty(values.shape, device="cpu"), False)


# --- mean field ---

SWAPPED = {"before": "after", "after": "before"}


class _Step:
    """Mean field of one image [1, 3, H, W]: ``start`` and then, any number of times, ``advance``. They write the
    distribution to ``out`` [1, C, H, W] unless it is None; ``goes_on`` says that there will be another.
    """

    needs_before = False  # whether a step has to be given the last distribution

    def __init__(
        self,
        unary: Tensor,
        kernels: list[tuple[float, float, float | None]],
        compat: Tensor | None,
        normalization: str,
        filters: list[Callable[[Tensor, Tensor, bool], Tensor]],
    ) -> None:
        self.unary, self.shape, self.weights = unary, unary.shape, [weight for weight, _, _ in kernels]
        self.matrix = None if compat is None else -(compat + compat.t()).float() / 2
        self.filters, self.normalization = filters, normalization
        ones = torch.ones(1, 1, *self.shape[2:], device="cpu")
        self.norms = [run(ones, torch.empty_like(ones), False) for run in filters]

    def message(self, values: Tensor, transpose: bool) -> Tensor:
        """What all kernels make of [1, C, H, W]; ``transpose`` is the adjoint."""
        total = torch.zeros(self.shape, device="cpu")
        normalization = SWAPPED.get(self.normalization, self.normalization) if transpose else self.normalization
        for run, norm, weight in zip(self.filters, self.norms, self.weights):
            before, after = _factors(norm, normalization)
            near = run(values if before is None else values * before, torch.empty(self.shape, device="cpu"), transpose)
            near = near if after is None else near.mul_(after)
            if self.matrix is not None:
                near = (self.matrix @ near.flatten(2)).view(self.shape)
            total.add_(near, alpha=weight)
        return total


class _ExactStep(_Step):
    needs_before = True

    def start(self, out: Tensor, goes_on: bool) -> None:
        out.copy_(torch.softmax(-self.unary, 1))

    def advance(self, before: Tensor, out: Tensor | None, goes_on: bool) -> tuple[float, float]:
        """The sums of |q - before| and of before * (log(before) - logits)."""
        logits = self.message(before, False) - self.unary
        q = torch.softmax(logits, 1)
        if out is not None:
            out.copy_(q)
        divergence = before * (before.clamp_min(1e-20).log() - logits)
        return float((q - before).abs().double().sum()), float(divergence.double().sum())


class _LatticeStep(_Step):
    def __init__(
        self,
        unary: Tensor,
        kernels: list[tuple[float, float, float | None]],
        compat: Tensor | None,
        normalization: str,
        lattices: list[_Lattice],
    ) -> None:
        super().__init__(unary, kernels, compat, normalization, [partial(_filter, lattice) for lattice in lattices])
        self.kept, self.given = [lattices], []
        for lattice, norm, weight in zip(lattices, self.norms, self.weights):
            arrays = [*_factors(norm, normalization), None]
            if self.matrix is not None:
                channels = len(self.matrix)
                arrays[2] = torch.zeros(channels, (channels + 15) // 16 * 16, device="cpu")
                arrays[2][:, :channels] = weight * self.matrix
            self.kept.append(arrays)
            self.given.append((lattice.given(), weight, [address(array) for array in arrays]))
        self.threads = torch.get_num_threads()
        floats, size = native.dense_crf_cpu_workspace(self.given, view(unary), self.threads)
        # Two pieces rather than one: the allocator asks the system for the largest ones anew each time.
        self.scratch = torch.empty(floats, device="cpu"), torch.empty(size, dtype=torch.uint8, device="cpu")

    def start(self, out: Tensor | None, goes_on: bool) -> None:
        self._native(None, out, True, goes_on)

    def advance(self, before: Tensor | None, out: Tensor | None, goes_on: bool) -> tuple[float, float]:
        """The sums of |q - before| and of before * (log(before) - logits), if ``before`` is given."""
        return self._native(before, out, False, goes_on)

    def _native(self, before: Tensor | None, out: Tensor | None, starts: bool, goes_on: bool) -> tuple[float, float]:
        views = [None if tensor is None else view(tensor) for tensor in (self.unary, before, out)]
        scratch = [tensor.data_ptr() for tensor in self.scratch]
        return native.dense_crf_cpu(self.given, *views, starts, goes_on, *scratch, self.threads)


def _step(
    image: Tensor,
    unary: Tensor,
    kernels: list[tuple[float, float, float | None]],
    compat: Tensor | None,
    method: str,
    normalization: str,
) -> _Step:
    unary, sigmas = unary.float(), [(rgb, xy) for _, xy, rgb in kernels]
    if method == "lattice":
        return _LatticeStep(unary, kernels, compat, normalization, [_of_pixels(image[0], *pair) for pair in sigmas])
    return _ExactStep(unary, kernels, compat, normalization, [_exact_filter(image, *pair) for pair in sigmas])


def _factors(norm: Tensor, normalization: str) -> tuple[Tensor | None, Tensor | None]:
    """What values are multiplied with before and after a filter, None for nothing; ``norm`` is the filter's sum of
    weights.
    """
    if normalization == "none":
        return None, None
    inverse = 1 / (norm + 1e-20)
    if normalization == "symmetric":
        root = inverse.sqrt()
        return root, root
    return (inverse, None) if normalization == "before" else (None, inverse)


def _run(
    step: _Step, num_iter: int, tolerance: float, convergence: bool, out: Tensor | None = None
) -> tuple[list[Tensor], list[float]]:
    """The last distribution goes to ``out``; without, all of them are returned. Beside them the divergence of each if
    asked for.
    """
    watched = out is None or tolerance > 0 or convergence or step.needs_before

    def fresh(left: int) -> Tensor | None:
        return torch.empty(step.shape, device="cpu") if watched else None if left else out

    q, met, found = fresh(num_iter), [], []
    step.start(q, num_iter > 0 or convergence)
    for left in range(num_iter - 1, -1, -1):
        met += [q] if out is None else []
        before, q = q, fresh(left)
        change, divergence = step.advance(before, q, left > 0 or convergence)
        found.append(divergence)
        if tolerance > 0 and change < tolerance * q.numel():
            break
    if convergence:
        found.append(step.advance(q, None, False)[1])
        found += found[-1:] * (num_iter + 1 - len(found))
    if watched and out is not None:
        out.copy_(q)
    return [*met, q], found if convergence else []


def _exact_filter(image: Tensor, sigma_rgb: float | None, sigma_xy: float) -> Callable[[Tensor, Tensor, bool], Tensor]:
    return lambda values, out, transpose: out.copy_(
        bilateral_filter(image, values, sigma_rgb, sigma_xy, "exact", transpose)
    )


# --- the lattice ---


class _Lattice(NamedTuple):
    """A permutohedral lattice that is built: its height, width, dims, vertices, rows and the most rows of a tile, and
    its arrays as the kernels take them (corner, weight, first, vertex, start, row, chained, chain).
    """

    sizes: tuple[int, ...]
    arrays: tuple[Tensor, ...]

    def given(self) -> tuple[tuple[int, ...], list[int]]:
        return self.sizes, [array.data_ptr() for array in self.arrays]


def _of_pixels(image: Tensor, sigma_rgb: float | None, sigma_xy: float) -> _Lattice:
    """Of an image [3, H, W] with its colours, or without."""
    image = image.float().contiguous()
    _, height, width = image.shape
    dims, divisor = (2, 1.0) if sigma_rgb is None else (5, sigma_rgb)
    return _build((image.data_ptr(), 1, height * width, divisor, sigma_xy), (height, width, dims))


def _build(features: tuple[int, int, int, float, float], shape: tuple[int, int, int]) -> _Lattice:
    """Of features as the kernels take them: address, strides of pixels and of features, sigma, and sigma_xy, 0 for
    those without place. Shape: height, width, dims.
    """
    threads, (height, width, dims) = torch.get_num_threads(), shape
    corner = torch.empty(height * width, dims + 1, dtype=torch.int16, device="cpu")  # what they hold is unsigned
    weight = torch.empty(height * width, dims + 1, device="cpu")
    first = torch.empty(native.lattice_tiles(*shape) + 1, dtype=torch.int32, device="cpu")
    found = _Lattice((*shape, 0, 0, 0), (corner, weight, first))
    scratch = torch.empty(native.lattice_corners_cpu_workspace(found.given(), threads), dtype=torch.uint8, device="cpu")
    rows, most = native.lattice_corners_cpu(features, found.given(), scratch.data_ptr(), threads)
    # There are at most as many vertices as rows.
    sizes = (rows,), (rows + 1,), (rows,), (dims + 1,), (dims + 1, rows + 1)
    arrays = *found.arrays, *(torch.empty(size, dtype=torch.int32, device="cpu") for size in sizes)
    found = _Lattice((*shape, 0, rows, most), arrays)
    further = workspace(native.lattice_links_cpu_workspace(found.given()), corner.device)
    vertices = native.lattice_links_cpu(found.given(), scratch.data_ptr(), further.data_ptr(), threads)
    return _Lattice((*shape, vertices, rows, most), arrays)


def _filter(lattice: _Lattice, values: Tensor, out: Tensor, transpose: bool) -> Tensor:
    """values [1, K, H, W] -> out."""
    given, threads = lattice.given(), torch.get_num_threads()
    scratch = workspace(native.lattice_filter_cpu_workspace(given, view(values), threads), values.device)
    native.lattice_filter_cpu(given, view(values), view(out), transpose, scratch.data_ptr(), threads)
    return out
