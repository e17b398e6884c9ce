"""PAR and PAMR in plain PyTorch: the formulas of `afa_kernels.par`, for correctness and comparison.

PAR (AFA, Eq. 9-11), for each pixel over its taps t (8 neighbours for each dilation):

    kappa_rgb = mean over colours of -(|I_t - I| / (sigma + 1e-8) / w1)^2      sigma: unbiased std of the neighbours
    kappa_pos = -(dist_t / (sigma_pos + 1e-8) / w2)^2                          sigma_pos: unbiased std of the distances
    weights   = softmax_t(kappa_rgb) + w3 softmax_t(kappa_pos)

PAMR (1-stage-wseg, Eq. 5-6): weights = softmax_t(mean over colours of -|I_t - I| / (1e-8 + 0.1 sigma)), sigma with
the centre counted once for each dilation.

Images beyond 0..1 are taken as they are. sigma is finite for finite pixels, though squares of float32 overflow from
about 1e18 on: PyTorch sums them in float64 on a CPU (on CUDA it does not, and they do overflow), the kernels shrink
such pixels first. Weights are NaN where a neighbour is NaN or infinite, and where every neighbour is so far from the
pixel, in sigmas, that kappa overflows.

Where all taps of a pixel have the same value of one colour and the pixel another, PAR's sigma of it is 0 and its share
of kappa -1e12 or more, equal for all taps. Exact arithmetic would choose among them by the other colours alone (weights
up to 0.9 away); float32 loses these beside it, and the weights come out nearly uniform. So they do in the published
code, and in the kernels. PAMR's sigma has the pixel itself in it, and is not 0 there.
"""

from __future__ import annotations

import torch

from ..diffusion.reference import diffuse, no_steps, shifted


def tap_offsets(dilations: list[int]) -> list[tuple[int, int]]:
    """(dy, dx) of every tap: for each dilation the 8 neighbours, row-major, centre left out."""
    return [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if dy or dx]


def position_weights(dilations: list[int], w2: float) -> torch.Tensor:
    """softmax of PAR's position term, [8*D] float64: the same at every pixel."""
    offsets = torch.tensor(tap_offsets(dilations), dtype=torch.float64, device="cpu")
    distance = offsets.norm(dim=1)
    return torch.softmax(-((distance / (distance.std() + 1e-8) / w2) ** 2), dim=0)


def par_weights(images: torch.Tensor, dilations: list[int], w1: float, w2: float, w3: float) -> torch.Tensor:
    """images [B, 3, H, W] in 0..1 -> [B, 8*D, H, W] in the dtype of images; every pixel's weights sum to 1 + w3."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    pixels = images.to(dtype)
    neighbours = shifted(pixels, tap_offsets(dilations))  # [B, 3, 8*D, H, W]
    sigma = neighbours.std(dim=2, keepdim=True)
    kappa = -(((neighbours - pixels.unsqueeze(2)).abs() / (sigma + 1e-8) / w1) ** 2)
    position = w3 * position_weights(dilations, w2).to(pixels)
    return (torch.softmax(kappa.mean(dim=1), dim=1) + position[:, None, None]).to(images.dtype)


def pamr_weights(images: torch.Tensor, dilations: list[int]) -> torch.Tensor:
    """images [B, 3, H, W] in 0..1 -> [B, 8*D, H, W] in the dtype of images; every pixel's weights sum to 1."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    pixels = images.to(dtype)
    neighbours = shifted(pixels, tap_offsets(dilations))
    centre = pixels.unsqueeze(2)
    sigma = torch.cat([neighbours, centre.expand(-1, -1, len(dilations), -1, -1)], dim=2).std(dim=2, keepdim=True)
    kappa = -((neighbours - centre).abs() / (1e-8 + 0.1 * sigma))
    return torch.softmax(kappa.mean(dim=1), dim=1).to(images.dtype)


def refine(
    images: torch.Tensor,
    masks: torch.Tensor,
    dilations: list[int],
    num_iter: int,
    factors: tuple[float, float, float] | None,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights, then num_iter steps of diffusion; factors (w1, w2, w3) for PAR, None for PAMR. masks have the
    image's size.
    """
    if num_iter == 0:
        return no_steps(masks, images, class_mask)
    dtype = torch.promote_types(torch.promote_types(images.dtype, masks.dtype), torch.float32)
    pixels = images.to(dtype)
    weights = pamr_weights(pixels, dilations) if factors is None else par_weights(pixels, dilations, *factors)
    return diffuse(weights, masks.to(dtype), tap_offsets(dilations), num_iter, "replicate", class_mask).to(masks.dtype)
