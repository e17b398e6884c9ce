"""Draws the operators' pictures, docs/images/operators/*.png: what each does to one generated scene.

    python docs/pictures.py [NAME ...]

The scene is of the data set that `afa demo` learns from; each function below is one picture, named as its file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import afa_kernels as ops
from afa_model.data.synthetic import SyntheticSettings, scene

FOLDER = Path(__file__).resolve().parent / "images" / "operators"
HEAT = matplotlib.colormaps["inferno"].with_extremes(bad="lightgrey")
TOPS = {"sinkhorn": 2.0, "affinity": 1.0, "feature_affinity": 1.0, "path_affinity": 1.0}
"""Where a picture's scale ends; else at the largest value of each map."""
CELL = 4  # pixels to a cell of the grid that affinities and CAMs have
RADIUS = 8
NUMBER = 11  # of the picture in the data set

Panel = tuple[str, np.ndarray]


def the_scene() -> tuple[torch.Tensor, torch.Tensor]:
    """image [1, 3, H, W] in 0..1, and where its animals are [1, 1, H, W]."""
    image, mask = scene(SyntheticSettings(), NUMBER)
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask != 0).float()[None, None]


def coarse(mask: torch.Tensor, cell: int = 8) -> torch.Tensor:
    """A mask as a CAM has it: in cells, blurred and noisy, in 0..1; the sizes as of the mask."""
    cells = F.avg_pool2d(mask, cell)
    cells = F.avg_pool2d(F.pad(cells, (1,) * 4, mode="replicate"), 3, 1)
    noise = torch.rand(cells.shape, generator=torch.Generator().manual_seed(0))
    return F.interpolate((cells + 0.25 * (noise - 0.5)).clamp(0, 1), mask.shape[2:], mode="bilinear")


def features(image: torch.Tensor) -> torch.Tensor:
    """[1, C, h, w]: mean and spread of the colours around each cell, centred: what stands for a network's features."""
    wide = F.pad(image, (CELL,) * 4, mode="replicate")
    mean = F.avg_pool2d(wide, 3 * CELL, CELL)
    spread = (F.avg_pool2d(wide**2, 3 * CELL, CELL) - mean**2).clamp(min=0).sqrt()
    both = torch.cat([mean, 2 * spread], dim=1)
    return both - both.mean((2, 3), keepdim=True)


def picture(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()


def map_of(values: torch.Tensor) -> np.ndarray:
    return values.detach().numpy()


def around(window: torch.Tensor, y: int, x: int) -> np.ndarray:
    """The affinities of one pixel, where they are in the image; NaN elsewhere."""
    side = round(window.shape[1] ** 0.5)
    radius = side // 2
    shown = np.full(window.shape[2:], np.nan, dtype=np.float32)
    for tap, value in enumerate(window[0, :, y, x].tolist()):
        at = y + tap // side - radius, x + tap % side - radius
        if 0 <= at[0] < shown.shape[0] and 0 <= at[1] < shown.shape[1]:
            shown[at] = value
    return shown


def part_of_the_object(mask: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A CAM on the grid that is bright on one end of the object, and a cell there."""
    cells = F.avg_pool2d(mask, CELL)[0, 0]
    rows, columns = torch.where(F.avg_pool2d(cells[None], 5, 1, 2)[0] > 0.99)
    leftmost = int(columns.argmin())
    y, x = int(rows[leftmost]), int(columns[leftmost])
    away = (torch.arange(cells.shape[0])[:, None] - y) ** 2 + (torch.arange(cells.shape[1])[None] - x) ** 2
    return (cells * torch.exp(-away / 20))[None, None], y, x


# --- the pictures -----------------------------------------------------------------------------------------------------


def par() -> list[Panel]:
    image, mask = the_scene()
    cam = coarse(mask)
    return [
        ("image", picture(image)),
        ("mask", map_of(cam[0, 0])),
        ("PAMR, 10 iterations", map_of(ops.pamr(image, cam, (1, 2, 4, 8, 12, 24), 10)[0, 0])),
        ("PAR, 10 iterations", map_of(ops.par(image, cam)[0, 0])),
    ]


def affinity() -> list[Panel]:
    image, mask = the_scene()
    there = features(image)
    height, width = there.shape[2:]
    tokens = there.flatten(2).transpose(1, 2)[:, None] * 6
    window = ops.window_affinity(tokens, tokens, torch.ones(1) * 2, -torch.ones(1), height, width, RADIUS)
    _, y, x = part_of_the_object(mask)
    return [
        ("image", picture(image)),
        ("affinity of a cell on the object", around(window, y, x)),
        ("of a cell beside it", around(window, 8, 8)),
    ]


def random_walk() -> list[Panel]:
    image, mask = the_scene()
    cam, y, x = part_of_the_object(mask)
    window = ops.feature_affinity(features(image) * 8, RADIUS, "exp_l1")
    steps = [ops.random_walk(window, cam, RADIUS, power=8, num_steps=count)[0, 0] for count in (4, 32)]
    return [
        ("image", picture(image)),
        ("CAM", map_of(cam[0, 0])),
        ("affinity of its peak", around(window, y, x)),
        ("after 4 steps", map_of(steps[0])),
        ("after 32 steps", map_of(steps[1])),
    ]


def bilateral() -> list[Panel]:
    image, mask = the_scene()
    cam = coarse(mask)
    probs = torch.cat([1 - cam, cam], dim=1)
    refined = ops.dense_crf(255 * image, probs, bi_xy_std=30, bi_rgb_std=13)
    _, y, x = part_of_the_object(mask)
    point = torch.zeros_like(mask)
    point[0, 0, y * CELL + CELL // 2, x * CELL + CELL // 2] = 1
    return [
        ("image", picture(image)),
        ("weights of a pixel", map_of(ops.bilateral_filter(255 * image, point, 25, 20)[0, 0])),
        ("probability", map_of(cam[0, 0])),
        ("label", map_of(probs.argmax(1)[0])),
        ("label after the CRF", map_of(refined.argmax(1)[0])),
    ]


def diffuse() -> list[Panel]:
    taps = [(dy, dx) for dy in (-3, 0, 3) for dx in (-3, 0, 3)] + [(0, 1), (1, 0), (0, -1), (-1, 0)]
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 14] = 1
    weights = torch.ones(1, len(taps), 41, 41) / len(taps)
    weights[..., 26:] = 0  # nothing is gathered by what lies to the right
    shown = np.zeros((41, 41), dtype=np.float32)
    for dy, dx in taps:
        shown[20 + dy, 14 + dx] = 1
    steps = [(f"after {count}", ops.diffuse(weights, point, taps, count, "zero")[0, 0]) for count in (1, 4, 16)]
    return [("13 taps of a pixel", shown), *((title, map_of(values)) for title, values in steps)]


def edge_map(mask: torch.Tensor) -> torch.Tensor:
    """[1, 1, h, w]: where object and background meet, in cells of half the usual size."""
    cells = F.avg_pool2d(mask, CELL // 2)
    most, least = F.max_pool2d(cells, 3, 1, 1), -F.max_pool2d(-cells, 3, 1, 1)
    return 0.95 * (most - least).clamp(0, 1)


def path_affinity() -> list[Panel]:
    image, mask = the_scene()
    edge = edge_map(mask)
    cam, y, x = part_of_the_object(mask)
    cam = F.interpolate(cam, edge.shape[2:], mode="bilinear")
    return [
        ("image", picture(image)),
        ("edge", map_of(edge[0, 0])),
        ("affinity of a cell", around(ops.path_affinity(edge, 9), 2 * y, 2 * x)),
        ("CAM", map_of(cam[0, 0])),
        ("walked, 64 steps", map_of(ops.propagate_to_edge(cam, edge, 5, 10, 6)[0, 0])),
    ]


def feature_affinity() -> list[Panel]:
    image, mask = the_scene()
    there = features(image)
    _, y, x = part_of_the_object(mask)
    kinds = (("cos", there), ("exp_l1", 8 * there), ("relu_dot", F.normalize(there, dim=1)))
    windows = [(f'"{kind}"', around(ops.feature_affinity(values, RADIUS, kind), y, x)) for kind, values in kinds]
    return [("image", picture(image)), *windows]


def pcm() -> list[Panel]:
    image, mask = the_scene()
    cam, _, _ = part_of_the_object(mask)
    return [
        ("image", picture(image)),
        ("CAM", map_of(cam[0, 0])),
        ("revised by all pixels", map_of(ops.pcm(cam, features(image))[0, 0])),
    ]


def sinkhorn() -> list[Panel]:
    image, _ = the_scene()
    window = ops.feature_affinity(features(image) * 8, RADIUS, "exp_l1")
    panels = [("image", picture(image))]
    for count in (0, 1, 3):
        dense = ops.window_to_dense(ops.sinkhorn(window, RADIUS, count), RADIUS)[0]
        sums = dense.sum(0) / dense.sum(0).mean()
        panels.append((f"sums of columns, {count} turns", map_of(sums.view(window.shape[2:]))))
    return panels


PICTURES = (par, affinity, random_walk, bilateral, diffuse, path_affinity, feature_affinity, pcm, sinkhorn)


def draw(name: str, panels: list[Panel]) -> None:
    figure, places = plt.subplots(1, len(panels), figsize=(2.1 * len(panels), 2.4), dpi=100)
    for place, (title, values) in zip(places, panels):
        scale = {} if values.ndim == 3 else {"cmap": HEAT, "vmin": 0, "vmax": TOPS.get(name)}
        place.imshow(values, interpolation="nearest", **scale)
        place.set_title(title, fontsize=8)
        place.set_axis_off()
    figure.tight_layout(pad=0.4)
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    torch.manual_seed(0)
    wanted = sys.argv[1:] or [each.__name__ for each in PICTURES]
    for each in PICTURES:
        if each.__name__ in wanted:
            draw(each.__name__, each())
