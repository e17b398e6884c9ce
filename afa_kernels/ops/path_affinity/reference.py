"""Affinity along straight paths in plain PyTorch: the oracle of the other backends.

    A_ij = 1 - max of edge over the path from i to j = i + (dy, dx),   dy^2 + dx^2 < radius^2        (IRN)

The path of (dy, dx) has all whole points (py, px) of the box between the two pixels whose distance from the line
through them is below 1. Where several of them hold the maximum, its gradient is that of the first, by descending
|py| + |px| and then row-major.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Point = tuple[int, int]


def path(dy: int, dx: int) -> list[Point]:
    """The points of a direction of the half plane (dy > 0, or dy = 0 and dx > 0), its far end first."""
    box = [(py, px) for py in range(dy + 1) for px in range(min(dx, 0), max(dx, 0) + 1)]
    near = [(py, px) for py, px in box if (dy * px - dx * py) ** 2 < dy * dy + dx * dx]
    return sorted(near, key=lambda point: -abs(point[0]) - abs(point[1]))  # stable


def directions(radius: int, farthest_y: int, farthest_x: int) -> list[Point]:
    """Those of the half plane within the radius, row-major, as far as an image can have them."""
    reach_y, reach_x = min(radius - 1, farthest_y), min(radius - 1, farthest_x)
    offsets = [(dy, dx) for dy in range(reach_y + 1) for dx in range(-reach_x, reach_x + 1)]
    return [(dy, dx) for dy, dx in offsets if (dy, dx) > (0, 0) and dy * dy + dx * dx < radius * radius]


def path_affinity(edge: torch.Tensor, radius: int, reach: int | None = None) -> torch.Tensor:
    """edge [B, 1, H, W] -> [B, taps, H, W] in its dtype, the taps at most ``reach`` pixels away in each axis (the
    radius by default). Those that no path belongs to hold 0, the centre 1.
    """
    reach = radius if reach is None else reach
    height, width = edge.shape[2:]
    values = edge[:, 0].to(torch.promote_types(edge.dtype, torch.float32))
    reach_y, reach_x = min(reach, height - 1), min(reach, width - 1)
    # 0 with a gradient, for edges without any path.
    none = torch.where(torch.zeros((), dtype=torch.bool, device=values.device), values, 0)
    planes = {(0, 0): none + 1}
    for dy, dx in directions(radius, height - 1, width - 1):
        left, right = max(0, -dx), width - max(0, dx)  # columns that the path starts from
        points = [values[:, py : py + height - dy, left + px : right + px] for py, px in path(dy, dx)]
        affinity = 1 - torch.stack(points).max(0).values
        planes[dy, dx] = F.pad(affinity, (left, width - right, 0, dy))
        planes[-dy, -dx] = F.pad(affinity, (left + dx, width - right - dx, dy, 0))
    offsets = [(dy, dx) for dy in range(-reach_y, reach_y + 1) for dx in range(-reach_x, reach_x + 1)]
    window = torch.stack([planes.get(offset, none) for offset in offsets], 1)
    window = window.unflatten(1, (2 * reach_y + 1, 2 * reach_x + 1))
    beyond = (0, 0, 0, 0, reach - reach_x, reach - reach_x, reach - reach_y, reach - reach_y)
    return F.pad(window, beyond).flatten(1, 2).to(edge.dtype)
