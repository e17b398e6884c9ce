"""The native kernels of the bilateral filter, called: the ``native`` backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import native, view, workspace

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
            _filter(_build(_features(image, sigma_rgb, sigma_xy)), value, to, transpose)
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
        from . import native_cuda

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
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    divergences = torch.zeros(len(unary), num_iter + 1 if convergence else 0, dtype=torch.float64)
    for b, energy in enumerate(unary.split(1)):
        step = _Step(images[b : b + 1], energy, kernels, compat, method, normalization)
        _, q, found = _run(step, num_iter, tolerance, convergence)
        out[b : b + 1] = step.planes(q)
        divergences[b] = torch.tensor(found, dtype=torch.float64)
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
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    for b, energy in enumerate(unary.split(1)):
        step = _Step(images[b : b + 1], energy, kernels, compat, method, normalization)
        before, last, _ = _run(step, num_iter, tolerance, False, keep=True)
        slope, total = grad[b : b + 1].float(), torch.zeros(energy.shape)
        for left, rows in zip(range(len(before), -1, -1), [last, *reversed(before)]):
            q = step.planes(rows)
            logits = q * (slope - (q * slope).sum(1, keepdim=True))
            total -= logits
            if left:
                slope = step.adjoint(logits)
        out[b : b + 1] = total
    return out


def lattice(features: Tensor) -> _Lattice:
    """features [N, d] -> what `filter_lattice` takes."""
    return _build(features)


def filter_lattice(lattice: _Lattice, values: Tensor) -> Tensor:
    """values [1, K, H, W] float32 with H * W = N -> the same."""
    out = torch.empty(values.shape)
    _filter(lattice, values, out, False)
    return out


# --- mean field ---

SWAPPED = {"before": "after", "after": "before"}


class _Step:
    """An iteration of mean field for one image, on points with their channels side by side, [N, channels rounded up to
    a multiple of 16].
    """

    def __init__(
        self,
        image: Tensor,
        unary: Tensor,
        kernels: list[tuple[float, float, float | None]],
        compat: Tensor | None,
        method: str,
        normalization: str,
    ) -> None:
        self.shape, self.image, self.kernels = unary.shape, image, kernels
        self.normalization, self.method = normalization, method
        self.channels, self.points = unary.shape[1], unary.shape[2] * unary.shape[3]
        self.base = self.rows(-unary.float())
        self.matrix = None if compat is None else -(compat + compat.t()).float() / 2
        sigmas = [(rgb, xy) for _, xy, rgb in kernels]
        if method == "lattice":
            self.lattices = [_build(_features(image[0], *pair)) for pair in sigmas]
            filters = [_lattice_filter(lattice) for lattice in self.lattices]
        else:
            filters = [_exact_filter(image, *pair) for pair in sigmas]
        ones = torch.ones(1, 1, *self.shape[2:])
        self.filters, self.norms = filters, [run(ones, False) for run in filters]
        self.given = self._given() if method == "lattice" else []
        self.logits, self.spread = torch.empty_like(self.base), torch.empty_like(self.base)

    def _given(self) -> list[tuple]:
        """The kernels as the native step takes them, the norm among the weights of the lattice."""
        self.kept, given = [], []
        for lattice, norm, (weight, _, _) in zip(self.lattices, self.norms, self.kernels):
            lattice = lattice.times(*(factor.flatten() for factor in _factors(norm, self.normalization)))
            matrix = None
            if self.matrix is not None:
                matrix = torch.zeros(self.channels, self.base.shape[1])
                matrix[:, : self.channels] = weight * self.matrix
            self.kept.append((lattice, matrix))
            given.append((*lattice.given(), weight, 0 if matrix is None else matrix.data_ptr()))
        return given

    def rows(self, values: Tensor) -> Tensor:
        """[1, C, H, W] -> [N, stride], 0 behind the channels."""
        rows = torch.zeros(self.points, (self.channels + 15) // 16 * 16)
        rows[:, : self.channels] = values[0].flatten(1).t()
        return rows

    def planes(self, rows: Tensor) -> Tensor:
        return rows[:, : self.channels].t().reshape(self.shape)

    def start(self) -> Tensor:
        out = torch.empty_like(self.base)
        self._native([], self.base, self.base, out)
        return out

    def __call__(self, q: Tensor, out: Tensor, keep_logits: bool = False) -> Tensor:
        """The next distribution, written to ``out``; returns its logits, if they are to be kept."""
        if self.method == "exact":
            logits = self.rows(self.planes(self.base) + self.message(self.planes(q), False))
            self._native([], logits, q, out)
            return logits
        self._native(self.given, self.base, q, out, keep_logits)
        return self.logits if self.given else self.base

    def _native(self, kernels: list[tuple], base: Tensor, q: Tensor, out: Tensor, keep_logits: bool = False) -> None:
        scratch = workspace(native.dense_crf_cpu_workspace(kernels, self.points, self.channels), q.device)
        rows = [tensor.data_ptr() for tensor in (base, q, self.logits, self.spread, out)]
        last = keep_logits, scratch.data_ptr(), torch.get_num_threads()
        native.dense_crf_cpu(kernels, self.points, self.channels, rows, *last)

    def message(self, values: Tensor, transpose: bool) -> Tensor:
        """What all kernels make of [1, C, H, W]."""
        total = torch.zeros(self.shape)
        normalization = SWAPPED.get(self.normalization, self.normalization) if transpose else self.normalization
        for run, norm, (weight, _, _) in zip(self.filters, self.norms, self.kernels):
            before, after = _factors(norm, normalization)
            near = run(values * before, transpose) * after
            if self.matrix is not None:
                near = (self.matrix @ near.flatten(2)).view(self.shape)
            total += weight * near
        return total

    def adjoint(self, slope: Tensor) -> Tensor:
        return self.message(slope, True)


def _factors(norm: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    """What values are multiplied with before and after a filter; ``norm`` is the filter's sum of weights."""
    ones, inverse = torch.ones_like(norm), 1 / (norm + 1e-20)
    return {
        "none": (ones, ones),
        "before": (inverse, ones),
        "after": (ones, inverse),
        "symmetric": (inverse.sqrt(), inverse.sqrt()),
    }[normalization]


def _run(
    step: _Step, num_iter: int, tolerance: float, convergence: bool, keep: bool = False
) -> tuple[list[Tensor], Tensor, list[float]]:
    """The distributions before the last if they are to be kept, the last, and the divergence of each if asked for."""
    q, spare, kept, found = step.start(), None, [], []
    for _ in range(num_iter):
        out = torch.empty_like(q) if spare is None else spare
        logits = step(q, out, convergence)
        if convergence:
            found.append(_divergence(q, logits, step.channels))
        small = tolerance > 0 and float((out - q)[:, : step.channels].abs().mean()) < tolerance
        kept, spare, q = ([*kept, q], None, out) if keep else ([], q, out)
        if small:
            break
    if convergence:
        found.append(_divergence(q, step(q, torch.empty_like(q), True), step.channels))
        found += found[-1:] * (num_iter + 1 - len(found))
    return kept, q, found


def _divergence(q: Tensor, logits: Tensor, channels: int) -> float:
    q = q[:, :channels]
    return float((q * (q.clamp_min(1e-20).log() - logits[:, :channels])).double().sum())


def _lattice_filter(lattice: _Lattice) -> Callable[[Tensor, bool], Tensor]:
    def run(values: Tensor, transpose: bool) -> Tensor:
        out = torch.empty(values.shape)
        _filter(lattice, values, out, transpose)
        return out

    return run


def _exact_filter(image: Tensor, sigma_rgb: float | None, sigma_xy: float) -> Callable[[Tensor, bool], Tensor]:
    return lambda values, transpose: bilateral_filter(image, values, sigma_rgb, sigma_xy, "exact", transpose)


# --- the lattice ---


class _Lattice(NamedTuple):
    """A permutohedral lattice that is built: ``points``, ``dims`` and ``vertices`` by number, and its arrays as the
    kernels take them (index, weight, near, start, point, share).
    """

    points: int
    dims: int
    vertices: int
    arrays: tuple[Tensor, ...]

    def times(self, before: Tensor, after: Tensor) -> _Lattice:
        """The lattice of points that are multiplied before they are splatted, and after they are sliced."""
        index, weight, near, start, point, share = self.arrays
        share, weight = share * before[point].view_as(share), weight * after[:, None]
        return self._replace(arrays=(index, weight, near, start, point, share))

    def given(self) -> tuple[int, int, int, list[int]]:
        return self.points, self.dims, self.vertices, [array.data_ptr() for array in self.arrays]


def _features(image: Tensor, sigma_rgb: float | None, sigma_xy: float) -> Tensor:
    """[3, H, W] -> [N, 5], or [N, 2] without colours; float32."""
    _, height, width = image.shape
    features = torch.empty(height, width, 2 if sigma_rgb is None else 5)
    spatial, rgb = torch.tensor(sigma_xy), torch.tensor(sigma_rgb or 1.0)
    features[..., 0] = torch.arange(width, dtype=torch.float32) / spatial
    features[..., 1] = (torch.arange(height, dtype=torch.float32) / spatial)[:, None]
    if sigma_rgb is not None:
        features[..., 2:] = image.permute(1, 2, 0).float() / rgb
    return features.flatten(0, 1)


def _build(features: Tensor) -> _Lattice:
    features, threads = features.contiguous(), torch.get_num_threads()
    points, dims = features.shape
    index, weight = (torch.empty(points, dims + 1, dtype=dtype) for dtype in (torch.int32, torch.float32))
    scratch = workspace(native.lattice_build_cpu_workspace(points, dims), features.device)
    corners, last = [index.data_ptr(), weight.data_ptr()], (scratch.data_ptr(), threads)
    vertices = native.lattice_corners_cpu(features.data_ptr(), points, dims, corners, *last)
    near = torch.empty(dims + 1, vertices, 2, dtype=torch.int32)
    start = torch.empty(vertices + 1, dtype=torch.int32)
    lattice = _Lattice(
        points, dims, vertices, (index, weight, near, start, torch.empty_like(index), torch.empty_like(weight))
    )
    native.lattice_links_cpu(*lattice.given(), *last)
    return lattice


def _filter(lattice: _Lattice, values: Tensor, out: Tensor, transpose: bool) -> None:
    """values [1, K, H, W] -> out."""
    threads = torch.get_num_threads()
    size = native.lattice_filter_cpu_workspace(*lattice[:3], view(values), threads)
    scratch = workspace(size, values.device)
    native.lattice_filter_cpu(*lattice.given(), view(values), view(out), transpose, scratch.data_ptr(), threads)
