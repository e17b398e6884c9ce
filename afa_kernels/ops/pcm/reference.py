"""The pixel correlation module in plain PyTorch: the oracle of the other backends.

    u_i = f_i / (|f_i| + 1e-5),   a_ij = max(u_i . u_j, 0),   out_j = sum_i cams_i a_ij / (sum_i a_ij + 1e-5)

over all pairs of pixels of an image (SEAM), the matrix a of N x N formed. CAMs of another size are
resized to that of the features first, bilinear with aligned corners.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-5


def pcm(cams: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """cams [B, K, h, w], features [B, C, H, W] -> [B, K, H, W]."""
    dtype = torch.promote_types(torch.promote_types(cams.dtype, features.dtype), torch.float32)
    values, size = cams.to(dtype), features.shape[2:]
    if cams.shape[2:] != size:
        values = F.interpolate(values, size=size, mode="bilinear", align_corners=True)
    units = features.to(dtype).flatten(2)
    units = units / (torch.linalg.vector_norm(units, dim=1, keepdim=True) + EPS)
    likeness = torch.relu(units.transpose(1, 2) @ units)
    out = values.flatten(2) @ likeness / (likeness.sum(1, keepdim=True) + EPS)
    return out.unflatten(2, size).to(cams.dtype)
