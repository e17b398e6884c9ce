"""Random-walk propagation: class activation spread along the affinity."""

from .functional import random_walk, random_walk_with_background

__all__ = ["random_walk", "random_walk_with_background"]
