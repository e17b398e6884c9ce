"""python benchmarks/weight_formats.py [--photos FOLDER] [--json FILE]

What PAR's masks would come to if its weights were kept in 16 bits: half the bytes of an image that no cache holds,
twice the pixels resident on a GPU. For each format the largest deviation after 10 and 20 iterations, of masks in 0..1,
from float64; beside it that of float32, which the kernels keep. Every format has a scale for each pixel, its largest
weight: ``half`` is float16, ``3 + 13`` a float without sign of so many bits of exponent and mantissa, ``fixed`` one
without exponent, ``diffused`` the same, each weight's rounding handed on to the next tap. ``kept sum`` corrects the
scale so that a pixel's weights still sum to 1 + w3. Without photographs the images are noise and two noisy halves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afa_kernels.bench.machine import commit
from afa_kernels.ops.diffusion.reference import diffuse
from afa_kernels.ops.par.reference import par_weights, tap_offsets
from afa_model.data.photographs import IMAGE_SUFFIXES, read_photograph

DILATIONS, FACTORS = [1, 2, 4, 8, 12, 24], (0.3, 0.3, 0.01)
ITERATIONS = (10, 20)
LEVELS = 65535


def half(weights: Tensor, kept_sum: bool) -> Tensor:
    scale = weights.amax(1, keepdim=True)
    return _scaled(weights, (weights / scale).half().double(), scale, kept_sum)


def fixed(weights: Tensor, kept_sum: bool) -> Tensor:
    scale = weights.amax(1, keepdim=True) / LEVELS
    return _scaled(weights, (weights / scale).round(), scale, kept_sum)


def small_float(weights: Tensor, kept_sum: bool) -> Tensor:
    scale, least = weights.amax(1, keepdim=True), 2.0**-7
    raised = weights / scale + least  # so that the last of 8 powers of two reaches down to 0
    step = torch.exp2(torch.floor(torch.log2(raised)) - 13)
    return _scaled(weights, (raised / step).round() * step - least, scale, kept_sum)


def diffused(weights: Tensor, kept_sum: bool) -> Tensor:
    scale = weights.amax(1, keepdim=True) / LEVELS
    levels, left = torch.empty_like(weights), torch.zeros_like(weights[:, 0])
    for tap in range(weights.shape[1]):
        wanted = weights[:, tap] / scale[:, 0] + left
        levels[:, tap] = wanted.round().clamp(0, LEVELS)
        left = wanted - levels[:, tap]
    return _scaled(weights, levels, scale, kept_sum)


def _scaled(weights: Tensor, levels: Tensor, scale: Tensor, kept_sum: bool) -> Tensor:
    return levels * (weights.sum(1, keepdim=True) / levels.sum(1, keepdim=True) if kept_sum else scale)


FORMATS = {
    "float32": lambda weights: weights.float().double(),
    "half": lambda weights: half(weights, False),
    "half, kept sum": lambda weights: half(weights, True),
    "3 + 13, kept sum": lambda weights: small_float(weights, True),
    "fixed": lambda weights: fixed(weights, False),
    "fixed, kept sum": lambda weights: fixed(weights, True),
    "diffused, kept sum": lambda weights: diffused(weights, True),
}


def images_of(folder: str | None, size: int) -> dict[str, Tensor]:
    """[1, 3, h, w] float64 in 0..1 by name."""
    noise = torch.rand(1, 3, size, size, dtype=torch.float64)
    halves = 1e-3 * noise
    halves[..., size // 2 :] += 0.9
    images = {"noise": noise, "two halves": halves}
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if folder else []
    for path in paths[:4]:
        pixels = torch.from_numpy(read_photograph(path)[:size, :size]).movedim(-1, 0)[None]
        images[path.stem] = pixels.double() / 255
    return images


def masks_of(height: int, width: int) -> Tensor:
    """Noise, an edge, pixels of 0 or 1, and a blob, [1, 4, H, W]."""
    noise, pixels = torch.rand(2, height, width, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    edge = (x < width // 2).double()
    blob = torch.exp(-18 * ((y / height - 0.5) ** 2 + (x / width - 0.5) ** 2))
    return torch.stack([noise, edge, (pixels > 0.5).double(), blob])[None]


def measure(folder: str | None, size: int) -> dict[str, dict[str, dict[str, float]]]:
    """Largest deviation by image, format and iterations."""
    torch.manual_seed(0)
    offsets, found = tap_offsets(DILATIONS), {}
    for name, image in images_of(folder, size).items():
        weights, masks = par_weights(image, DILATIONS, *FACTORS), masks_of(*image.shape[2:])
        exact = {count: diffuse(weights, masks, offsets, count, "replicate", None) for count in ITERATIONS}
        found[name] = {}
        for kind, make in FORMATS.items():
            kept = make(weights)
            # The masks stay in float64: what the format of the weights alone does.
            found[name][kind] = {
                str(count): (diffuse(kept, masks, offsets, count, "replicate", None) - exact[count]).abs().max().item()
                for count in ITERATIONS
            }
    return found


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = [(name, str(count)) for name in found for count in ITERATIONS]
    table = Table("image", *(name for name, _ in columns), title="largest deviation of the masks, in 0..1.22")
    table.add_row("iterations", *(count for _, count in columns), end_section=True)
    for kind in FORMATS:
        table.add_row(kind, *(f"{found[name][kind][count]:.1e}" for name, count in columns))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", metavar="FOLDER", help="take the first four photographs of it too")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, the photographs cut to it")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE too")
    options = parser.parse_args()
    found = measure(options.photos, options.size)
    show(found)
    if options.json:
        told = {"commit": commit(), "size": options.size, "deviation": found}
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
