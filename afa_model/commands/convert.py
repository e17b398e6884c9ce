"""`afa convert`: weights from one layout and kind of file into another."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..config import Parser, section
from ..errors import SavingError
from ..runs.convert import ConvertSettings, convert
from .options import mistakes_named, part, positionals_first, switched_on


def main(argv: Sequence[str]) -> None:
    """`afa convert SOURCE TARGET [--to public|afa|hub|mit|huggingface|mmseg] [--partial]`."""
    parser = Parser(
        prog="afa convert",
        description="Weights from one layout of names and one kind of file into another: checkpoints of afa train and"
        " of the public AFA code, folders as the Hugging Face Hub keeps them, and MiT backbones of mit_b*.pth, Hugging"
        " Face and mmsegmentation. What is missing, unknown or of another shape is listed, and nothing is written,"
        " unless --partial says so. What was written is read again and compared bit for bit.",
    )
    parser.add_argument(
        "source",
        type=str,
        metavar="SOURCE",
        help="a checkpoint or file of weights (.pth, .pt, .bin, .safetensors), a run's folder, or a folder as the Hub"
        " keeps one",
    )
    parser.add_argument(
        "target",
        type=str,
        metavar="TARGET",
        help="the file to write, whose ending says how: .safetensors, or .pth, .pt or .bin as torch.save; with --to hub"
        " a folder",
    )
    parser.add_class_arguments(ConvertSettings)
    options = parser.parse_args(positionals_first(switched_on(argv, "--partial")))
    settings = section(ConvertSettings, part(ConvertSettings, options))
    with mistakes_named():
        done = convert(options.source, options.target, settings)
    print(f"{options.source}: {done.found}")
    if done.left_out:
        print(f"left out, for {settings.to} has no place for it: {done.left_out}")
    for line in done.differences.lines():
        print(f"not converted, {line}" if not line.startswith("missing") else line, file=sys.stderr)
    if not done.same:
        raise SavingError(f"{done.target}, read again, does not hold the tensors of {options.source}")
    compared = "" if done.differences.lines() else ", read again: the same bit for bit"
    print(f"wrote {done.count} tensors to {done.target}{compared}")
