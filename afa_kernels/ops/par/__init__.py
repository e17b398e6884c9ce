"""Pixel-adaptive refinement: PAR of AFA, and PAMR of 1-stage-wseg, on which it builds."""

from .functional import DILATIONS, pamr, pamr_weights, par, par_weights
from .modules import PAMR, PAR

__all__ = ["DILATIONS", "PAMR", "PAR", "pamr", "pamr_weights", "par", "par_weights"]
