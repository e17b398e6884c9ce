"""Affinity of features: which pixels of a window have like features."""

from .functional import feature_affinity

__all__ = ["feature_affinity"]
