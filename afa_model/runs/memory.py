"""The C library's habit of giving memory back, switched off: training on a CPU asks for the same memory every step."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt in glibc's malloc.h


def keep_freed_memory(limit: int = (1 << 31) - 1) -> bool:
    """From now on this process keeps up to ``limit`` bytes of freed memory for its next allocations.

    By default glibc gets blocks above 32 MB from the kernel and gives them back when they are freed, and the
    kernel fills every page with zeros anew: a fifth of the time of a CAM pass at crop 480. Memory in use
    does not grow, memory held between two steps does.

    Returns whether the C library knows how (glibc does); nothing happens where it does not.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, limit))
