"""Diffusion over a fixed set of taps: the step that PAR, PAMR and the random walk share."""

from .functional import diffuse

__all__ = ["diffuse"]
