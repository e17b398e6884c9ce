"""Path affinity: how alike two pixels are by the edges between them; and class activation spread along it."""

from .functional import path_affinity, propagate_to_edge

__all__ = ["path_affinity", "propagate_to_edge"]
