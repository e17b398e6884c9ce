"""The pixel correlation module: class activation refined by the likeness of all pairs of pixels."""

from .functional import pcm

__all__ = ["pcm"]
