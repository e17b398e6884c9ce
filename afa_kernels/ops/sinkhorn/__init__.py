"""Sinkhorn normalisation: rows and columns of an affinity brought to sums of 1 by turns."""

from .functional import sinkhorn

__all__ = ["sinkhorn"]
