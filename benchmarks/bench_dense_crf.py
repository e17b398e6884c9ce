"""Dense CRFs as published for VOC (10 iterations; 3, 3; 4, 64, 5), and the filter by the permutohedral lattice alone.

The images are smooth colours with edges and some noise, for how many vertices a lattice has is up to the photograph;
the probabilities are of 21 classes in regions. The floor is what crosses memory at least once: images and
probabilities in, probabilities out. What the iterations move besides stands in the kernels' headers.

The reference, which looks for every vertex anew in each iteration, takes minutes for a photograph: there a GPU's
kernels are held against the CPU's, "on the CPU".
"""

from __future__ import annotations

import sys
from functools import partial

import as_the_command  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, compiled, kernels
from run import main
from torch import Tensor

import afa_kernels

CLASSES = 21
SIZES = [(1, 12, 17), (1, 375, 500), (8, 375, 500)]  # images, height, width
LARGEST_OF_REFERENCE = 1000  # pixels


def photographs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """images [B, 3, H, W] in 0..255, probabilities [B, 21, H, W]."""
    generator = torch.Generator().manual_seed(0)
    size = {"size": (height, width), "mode": "bicubic", "align_corners": False}
    colours = F.interpolate(torch.rand(batch, 3, 9, 12, generator=generator), **size)
    scores = F.interpolate(torch.randn(batch, CLASSES, 5, 7, generator=generator), **size)
    edges = 0.3 * (scores[:, :3] > 0)
    noise = 0.02 * torch.randn(batch, 3, height, width, generator=generator)
    images = (255 * (0.6 * colours + edges + noise)).clamp(0, 255).round()
    return images.to(torch.uint8), (6 * scores).softmax(1)


def on_the_cpu(call: partial, device: str) -> Tensor:
    moved = [value.cpu() if isinstance(value, Tensor) else value for value in call.args]
    return call.func(*moved).to(device)


def size_cases(batch: int, height: int, width: int, device: str, compiling: bool) -> list[Case]:
    images, probs = (tensor.to(device) for tensor in photographs(batch, height, width))
    calls = {
        "10 iterations": partial(afa_kernels.dense_crf, images, probs),
        "lattice filter": partial(afa_kernels.bilateral_filter, images, probs, 15.0, 50.0, "lattice"),
    }
    operators = {"10 iterations": "dense_crf", "lattice filter": "bilateral_filter"}
    table = []
    for name, call in calls.items():
        providers = {}
        if height * width <= LARGEST_OF_REFERENCE:
            providers["reference"] = partial(call, backend="reference")
            if compiling:
                providers["torch.compile"] = compiled(providers["reference"])
        elif device != "cpu":
            providers["on the CPU"] = partial(on_the_cpu, call, device)
        providers |= {backend: partial(call, backend=backend) for backend in kernels(operators[name], device)}
        # Roundings of the published iterations grow: two runs in float32 are 1e-4 apart.
        tolerance = 1e-3 if name == "10 iterations" else 1e-5
        case = f"{batch}x{CLASSES}x{height}x{width}, {name}"
        table.append(Case(case, providers, bytes=images.numel() + 8.0 * probs.numel(), tolerance=tolerance))
    return table


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    return [case for size in (SIZES[:1] if quick else SIZES) for case in size_cases(*size, device, compiling)]


if __name__ == "__main__":
    main(["dense_crf", *sys.argv[1:]])
