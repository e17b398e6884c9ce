"""Where the page is served, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..conventions import require
from ..data.photographs import MAX_PIXELS


@dataclass
class ServeSettings:
    """Where the page is served, and what it takes.

    Args:
        host: address to listen at; 127.0.0.1 lets nobody but this machine in, 0.0.0.0 everybody who reaches it.
        port: to listen at; 0 takes any that is free.
        examples: folder of photographs to offer; null: some of the run's data set if it is on this machine, else
            generated pictures.
        long_side: photographs are made smaller to have at most this many pixels along their longer side, so that the
            page answers at once.
        max_megabytes: refuse larger files.
        max_pixels: refuse photographs of more pixels than this.
        exif: turn photographs as their EXIF orientation says (apply), or leave them as they are stored (ignore).
    """

    host: str = "127.0.0.1"
    port: int = 7860
    examples: str | None = None
    long_side: int = 800
    max_megabytes: float = 50.0
    max_pixels: int = MAX_PIXELS
    exif: Literal["apply", "ignore"] = "apply"

    def __post_init__(self) -> None:
        require(bool(self.host), "host", "an address such as 127.0.0.1", self.host)
        require(0 <= self.port < 1 << 16, "port", "0..65535", self.port)
        require(32 <= self.long_side <= 4096, "long_side", "32..4096 pixels", self.long_side)
        require(0 < self.max_megabytes <= 1e6, "max_megabytes", "a positive number", self.max_megabytes)
        require(self.max_pixels >= 1, "max_pixels", "at least 1", self.max_pixels)
        require(self.exif in ("apply", "ignore"), "exif", "apply or ignore", self.exif)
