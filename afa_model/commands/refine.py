"""`afa refine`: refine CAMs and label maps that are there as files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import Parser, section
from ..evaluation.refine import RefineSettings, refine_files
from ..runtime.processes import choose_device
from .options import mistakes_named, part, positionals_first, switched_on


def main(argv: Sequence[str]) -> int:
    """`afa refine IMAGES MASKS --method crf|par|pamr --out DIR [--soft] [--shard I/N]`."""
    parser = Parser(
        prog="afa refine",
        description="Refine CAMs and label maps along the edges of their photographs; no checkpoint is needed. For each"
        " mask a PNG of class indices with the VOC palette. What is finished is skipped, so a line that was stopped can"
        " be given again; several processes share the files out, under torchrun or by --shard.",
    )
    parser.add_argument("images", type=str, metavar="IMAGES", help="folder of photographs, with its sub-folders")
    parser.add_argument(
        "masks",
        type=str,
        metavar="MASKS",
        help="folder of masks called as the photographs: class scores in 0..1 of any size, as .npy or .npz with an"
        " array [C, h, w], a dictionary {class: [h, w]}, keys and high_res or cam (IRN), or classes and scores (as"
        " --soft writes); or PNGs of class indices of the photographs' size, 255 unknown",
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write into")
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_class_arguments(RefineSettings)
    options = parser.parse_args(positionals_first(switched_on(argv, "--soft")))
    settings = section(RefineSettings, part(RefineSettings, options))
    device = choose_device(options.device)
    with mistakes_named():
        result = refine_files(options.images, options.masks, options.out, settings, device)
    index, count = settings.share()
    share = f"share {index + 1} of {count}: " if count > 1 else ""
    before = f", {result.skipped} were there" if result.skipped else ""
    rate = f" ({result.done / result.seconds:.2g} images a second)" if result.done else ""
    files = "labels and scores" if settings.soft else "labels"
    made = f"wrote {files} of {result.done} photograph{'s' * (result.done != 1)}"
    print(f"{share}{made} to {Path(options.out).expanduser()}{rate}{before}")
    if not result.problems:
        return 0
    print(f"{share}{len(result.problems)} could not be refined:", *result.problems, sep="\n  ", file=sys.stderr)
    return 1
