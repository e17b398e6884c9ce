"""`afa train`: train on a data set in VOC layout; on several GPUs `torchrun --nproc-per-node N -m afa_model train`."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse
from ..runs.loop import train


def main(argv: Sequence[str]) -> int:
    """`afa train [--config FILE|NAME] [--SECTION.KEY VALUE ...]`: 0 when done, 130 if stopped by a signal."""
    summary = train(parse(argv, "afa train", "Train AFA from image-level labels on a data set in VOC layout."))
    return 130 if summary.interrupted else 0
