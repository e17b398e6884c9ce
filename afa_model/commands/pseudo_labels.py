"""`afa pseudo-labels`: labels, CAMs and random walks of many photographs, for training something else on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..config import Parser, section
from ..config.renamed import flatten
from ..data.files import digest
from ..data.settings import DataSettings
from ..evaluation.pseudo_labels import ENDINGS, OF_EVALUATION, PseudoLabelSettings, Written, write_pseudo_labels
from ..labels.settings import LabelSettings
from ..runs.restore import Restored
from ..runtime.processes import choose_device
from .options import asks_for_help, mistakes_named, parser_of, part, restored, set_defaults, told_of_the_run

_PARTS = {"PAR": "refinement", "CAM": "CAM passes"}  # how phases are called in what is printed


def main(argv: Sequence[str]) -> int:
    """`afa pseudo-labels --checkpoint RUN --images LIST|FOLDER|PATTERN --out DIR [--labels FILE] [--save ...]`."""
    run = restored(argv)
    parser = _parser(argv, run)
    options = parser.parse_args(argv)
    if options.save is not None:  # as words, or as a list is written elsewhere
        options.save = tuple(" ".join(options.save).strip("[]").replace(",", " ").split())
    settings = section(PseudoLabelSettings, part(PseudoLabelSettings, options))
    how = section(LabelSettings, part(LabelSettings, options))
    data = section(DataSettings, options.data, "data.")
    device = choose_device(options.device)
    rooted = Path(data.root).is_dir()
    with mistakes_named(), nullcontext() if rooted else told_of_the_run(run, data):
        checkpoint = {"file": run.path.name, "trained": run.trained, "sha256": digest(run.path)}
        model = run.model.to(device)
        about = run.class_names, checkpoint
        result = write_pseudo_labels(model, options.images, options.out, *about, settings, how, data)
    return _tell(result, settings.share(), Path(options.out).expanduser())


def _parser(argv: Sequence[str], run: Restored | None) -> Parser:
    parser = parser_of(
        "afa pseudo-labels",
        "Write labels (palette PNGs at the photographs' own size, 255 unknown), CAMs and random walks of photographs,"
        " to train a segmentation network on: docs/second_stage.md. What is finished is skipped, so a line that was"
        " stopped can be given again; several processes share the photographs out, under torchrun or by --shard."
        " Settings that are not given are those of the run, as `afa evaluate` takes them.",
    )
    told = (
        "list files (.txt) or names of splits, whose photographs are in the data set (data.root); photographs, folders"
        " of them (with their sub-folders), or patterns such as 'photos/*.jpg'"
    )
    parser.add_argument("--images", nargs="+", type=str, required=True, metavar="IMAGES", help=told)
    parser.add_argument("--out", type=str, required=True, help="folder to write into")
    told = f"what to write, some of {', '.join(ENDINGS)}; null: all that the model gives but the last"
    parser.add_argument("--save", nargs="+", type=str, default=None, metavar="WHAT", help=told)
    parser.add_class_arguments(PseudoLabelSettings, skip={"save"})
    parser.add_class_arguments(LabelSettings)
    parser.add_class_arguments(DataSettings, "data")
    if asks_for_help(argv):
        parser.of_the_run(["data", *OF_EVALUATION, *(item.name for item in fields(LabelSettings))])
    if run is not None:
        # as `afa evaluate` has it: a protocol that is asked for is not mixed with what the run said of another
        evaluation = run.config.eval
        if any(word.partition("=")[0] == "--protocol" for word in argv):
            evaluation = evaluation.without_rows()
        sizes = {name: getattr(evaluation, name) for name in OF_EVALUATION}
        labels = flatten(asdict(evaluation.said(run.config.labels)))
        set_defaults(parser, {**sizes, **labels, **flatten({"data": asdict(run.config.data)})})
    return parser


def _tell(result: Written, share_of_all: tuple[int, int], out: Path) -> int:
    """What was done, in words; gives the exit code."""
    index, count = share_of_all
    share = f"share {index + 1} of {count}: " if count > 1 else ""
    *others, last = result.saved
    what = f"{', '.join(others)} and {last}" if others else last
    made = f"wrote {what} of {result.done} photograph{'s' * (result.done != 1)} to {out}"
    rate = f" ({result.done / result.seconds:.2g} images a second)" if result.done else ""
    before = f", {result.skipped} were there" if result.skipped else ""
    print(f"{share}{made}{rate}{before}")
    if result.done:
        classes = ", ".join(f"{source} ({number})" for source, number in result.sources.most_common())
        print(f"{share}classes from: {classes}")
        print(f"{share}milliseconds a photograph: {_spent(result)}")
    if not result.problems:
        return 0
    print(f"{share}{len(result.problems)} could not be labelled:", *result.problems, sep="\n  ", file=sys.stderr)
    return 1


def _spent(result: Written) -> str:
    spent: dict[str, Any] = {_PARTS.get(name, name): seconds for name, seconds in result.phases.items()}
    return ", ".join(f"{name} {1e3 * seconds / result.done:.3g}" for name, seconds in spent.items())
