"""Pixel-adaptive refinement: PAR of AFA, and PAMR of 1-stage-wseg, on which it builds."""

from . import samples  # noqa: F401  registers the backends
from .functional import DILATIONS, par, par_weights
from .modules import PAMR, PAR
from .pamr_functional import pamr, pamr_weights

__all__ = ["DILATIONS", "PAMR", "PAR", "pamr", "pamr_weights", "par", "par_weights"]
