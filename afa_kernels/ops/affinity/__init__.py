"""Affinity from attention: which pixels of a window belong together, and the loss that teaches it."""

from .functional import affinity_from_maps, dense_to_window, window_affinity, window_to_dense
from .losses import affinity_loss, attention_affinity_loss

__all__ = [
    "affinity_from_maps",
    "affinity_loss",
    "attention_affinity_loss",
    "dense_to_window",
    "window_affinity",
    "window_to_dense",
]
