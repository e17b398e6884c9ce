"""The bilateral filter, exact, by the lattice, and of place alone; and the dense CRF beside pydensecrf, where that is.

160 x 160 is what DenseEnergyLoss filters of a crop of 320; 500 x 375 a photograph of VOC. Where plain PyTorch takes
minutes, for ten iterations of its lattice on a CPU, it is left out, and ours stands first. The exact filter's floor
counts the pairs that matter, with a weight above 1e-7, found by sampling.

pydensecrf has one thread; "native 1 thread" is ours likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import afa_kernels

from ..harness import Case, kernels

CHANNELS = 21
QUICK, SMALL, PHOTOGRAPH = (80, 80), (160, 160), (375, 500)
# sigma_rgb and sigma_xy: of DenseEnergyLoss at its scale of 1/2, and of DeepLab's CRF.
SIGMAS = {QUICK: (15.0, 25.0), SMALL: (15.0, 50.0), PHOTOGRAPH: (5.0, 64.0)}
GAUSSIAN = 3.0
CRF = {"num_iter": 10, "pos_w": 3, "pos_xy_std": 3, "bi_w": 4, "bi_xy_std": 64, "bi_rgb_std": 5}


def photograph(height: int, width: int) -> Tensor:
    """[1, 3, H, W] uint8: regions that differ, smooth shades within them, and grain."""
    generator = torch.Generator().manual_seed(0)

    def shades(cell: int) -> Tensor:
        cells = torch.rand(1, 3, height // cell + 2, width // cell + 2, generator=generator)
        return torch.nn.functional.interpolate(cells, (height, width), mode="bicubic", align_corners=False)

    regions = (4 * shades(90)[:, :1]).floor() / 4
    grain = torch.randn(1, 3, height, width, generator=generator)
    return (80 + 100 * regions + 40 * shades(60) + 15 * shades(15) + 2 * grain).clamp(0, 255).to(torch.uint8)


def probabilities(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, CHANNELS, height // 25 + 2, width // 25 + 2, generator=generator)
    return torch.nn.functional.interpolate(3 * scores, (height, width), mode="bilinear").softmax(1)


def pairs_that_matter(image: Tensor, sigma_rgb: float, sigma_xy: float, samples: int = 200) -> float:
    """How many pairs of pixels have a weight above 1e-7, by those of some pixels."""
    height, width = image.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) / sigma_xy, torch.arange(width) / sigma_xy, indexing="ij")
    points = torch.cat([torch.stack([x, y]), image[0].float().cpu() / sigma_rgb]).flatten(1)
    chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(2))[:samples]
    found = sum(int(((points - points[:, [i]]).square().sum(0) / 2 < 16.1).sum()) for i in chosen)
    return float(found) / len(chosen) * height * width


def filter_case(method: str, size: tuple[int, int], device: str) -> Case:
    """``method`` may be "gaussian"."""
    image, values = photograph(*size).to(device), probabilities(*size).to(device)
    rgb, xy = (None, GAUSSIAN) if method == "gaussian" else SIGMAS[size]
    lattice = method == "lattice"
    call = partial(afa_kernels.bilateral_filter, image, values, rgb, xy, "lattice" if lattice else "exact")
    ours = kernels("lattice_filter" if lattice else "bilateral_filter", device)
    providers = {name: partial(call, backend=name) for name in ours}
    providers = {"reference": partial(call, backend="reference"), **providers}
    pixels = size[0] * size[1]
    operations = {
        # A distance, an exponential, and a multiply-add a channel.
        "exact": lambda: pairs_that_matter(image, *SIGMAS[size]) * (16.0 + 2.0 * CHANNELS),
        # To the six corners and back.
        "lattice": lambda: pixels * 2 * 6 * 2.0 * CHANNELS,
        "gaussian": lambda: pixels * CHANNELS * 2 * 2.0 * (2 * 5.8 * GAUSSIAN + 1),
    }[method]()
    return Case(
        f"{method}, {size[0]}x{size[1]}, {CHANNELS} channels",
        providers,
        bytes=4.0 * pixels * (3 + 2 * CHANNELS),
        operations=operations,
        tolerance=1e-3 if lattice else 1e-5,  # where two round otherwise, a pixel lies in another simplex
    )


def one_thread(call: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def by_pydensecrf(image: Tensor, probs: Tensor) -> Callable[[], Tensor] | None:
    try:
        import numpy as np
        from pydensecrf import densecrf
    except ImportError:
        return None
    height, width = image.shape[2:]
    pixels = image[0].permute(1, 2, 0).contiguous().numpy()
    unary = -probs[0].flatten(1).log().numpy()

    def call() -> Tensor:
        crf = densecrf.DenseCRF2D(width, height, CHANNELS)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy=CRF["pos_xy_std"], compat=CRF["pos_w"])
        crf.addPairwiseBilateral(sxy=CRF["bi_xy_std"], srgb=CRF["bi_rgb_std"], rgbim=pixels, compat=CRF["bi_w"])
        return torch.tensor(np.array(crf.inference(CRF["num_iter"]))).view(1, CHANNELS, height, width)

    return call


def crf_case(method: str, size: tuple[int, int], device: str) -> Case:
    image, probs = photograph(*size).to(device), probabilities(*size).to(device)
    call = partial(afa_kernels.dense_crf, image, probs, **CRF, method=method)
    providers: dict[str, Callable[[], Any]] = {}
    theirs = by_pydensecrf(image, probs) if device == "cpu" and method == "lattice" else None
    if theirs is not None:
        providers["pydensecrf"] = theirs
    if size == QUICK or (device == "cuda" and method == "lattice"):
        providers["reference"] = partial(call, backend="reference")
    ours = kernels("dense_crf", device) or ["reference"]
    providers |= {name: partial(call, backend=name) for name in ours}
    if device == "cpu" and "native" in ours:
        providers["native 1 thread"] = partial(one_thread, providers["native"])
    pixels = size[0] * size[1]
    return Case(
        f"CRF {method}, {size[0]}x{size[1]}, {CHANNELS} classes, {CRF['num_iter']} iterations",
        providers,
        bytes=4.0 * pixels * (3 + 2 * CHANNELS),
        # The corners of both kernels' simplices, there and back, and the softmax.
        operations=pixels * CRF["num_iter"] * CHANNELS * (2 * 2.0 * (6 + 3) + 10.0),
        tolerance=1e-3,
    )


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    """Nothing for a compiler here: the reference is a loop, or looks up what it has found. The exact sums of a whole
    photograph are for a GPU: a filter takes 20 seconds of two cores.
    """
    sizes = (QUICK,) if quick else (SMALL, PHOTOGRAPH)
    of_exact = sizes if device == "cuda" else sizes[:1]
    table = [filter_case("exact", size, device) for size in of_exact]
    table += [filter_case(method, size, device) for method in ("lattice", "gaussian") for size in sizes]
    table += [crf_case("lattice", size, device) for size in sizes]
    return table + [crf_case("exact", size, device) for size in sizes[1:] if device == "cuda"]
