"""`afa export`: the segmentation network as ONNX, TorchScript or a torch.export program."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Parser, section
from ..evaluation.export import ExportSettings, export_model
from .options import mistakes_named, part, positionals_first, restored, switched_on


def main(argv: Sequence[str]) -> None:
    """`afa export --checkpoint RUN --out FILE [--format onnx|torchscript|exported] [--size 512 512] [--dynamic]`."""
    parser = Parser(
        prog="afa export",
        description="Export the segmentation network of a checkpoint for other programs: one pass at the photograph's"
        " own size. What was written is run beside PyTorch before it counts; more than a thousandth of the largest"
        " logit between them is an error.",
    )
    told = "a run's folder (its best checkpoint is taken), a checkpoint, or a folder as the Hub keeps one"
    parser.add_argument("--checkpoint", type=str, required=True, help=told)
    told = "file to write; its ending (.onnx, .ts, .pt2) is the format where --format is not given"
    parser.add_argument("--out", type=str, required=True, help=told)
    parser.add_class_arguments(ExportSettings)
    argv = _as_list(switched_on(argv, "--dynamic"), "--size")
    run = restored(argv)
    options = parser.parse_args(positionals_first(argv))
    settings = section(ExportSettings, part(ExportSettings, options))
    with mistakes_named():
        path, compared = export_model(run.model, options.out, run.class_names, settings)
    print(f"{run.path}, {run.trained}")
    for item in compared:
        if settings.gives == "labels":
            difference = f"{100 * item.difference:.2g} % of the labels differ, where classes tie"
            difference = difference if item.difference else "the same labels"
        else:
            difference = f"largest difference {item.difference:.1e} of the largest logit"
        print(f"  {' x '.join(map(str, item.shape))} beside PyTorch: {difference}")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _as_list(argv: Sequence[str], option: str) -> list[str]:
    """``--size 512 512`` as ``--size [512, 512]``; one number stands for both."""
    words = list(argv)
    if option in words:
        start = words.index(option) + 1
        end = start
        while end < len(words) and not words[end].startswith("--") and end < start + 2:
            end += 1
        numbers = words[start:end]
        if numbers and all(number.isdigit() for number in numbers):
            words[start:end] = [f"[{numbers[0]}, {numbers[-1]}]"]
    return words
