"""`afa evaluate` and `afa predict`: a checkpoint, what to do with it, where the results go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from .checkpoint import CheckpointError
from .config import Parser, section, to_dict
from .errors import ConfigError
from .evaluate import EvaluateSettings, evaluate
from .predict import PredictSettings, draw_head_weights, predict
from .processes import processes
from .restore import Restored, load_model
from .voc import DataSettings, EvaluationSet
from .voc_files import DataError

_CHECKPOINT = "a run's folder (its best checkpoint is taken) or a checkpoint"


def _say_errors(command: str, work: Callable[[], None]) -> int:
    """Run ``work``; what the user can mend is one line on the error stream and exit code 2, no traceback."""
    try:
        work()
    except (ConfigError, CheckpointError, DataError, ValueError) as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(command: str, description: str) -> Parser:
    parser = Parser(prog=command, description=description)
    parser.add_argument("--checkpoint", type=str, required=True, help=_CHECKPOINT)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is one), cpu or cuda")
    return parser


def _given(argv: Sequence[str]) -> str | None:
    """The checkpoint, read before all else: the settings of its run are the defaults of the others."""
    for position, word in enumerate(argv):
        if word == "--checkpoint" and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith("--checkpoint="):
            return word.partition("=")[2]
    return None


def _restore(argv: Sequence[str], device: str) -> Restored | None:
    wanted = {"-h", "--help"}.isdisjoint(argv) and _given(argv)
    return load_model(wanted, device) if wanted else None


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """`afa evaluate --checkpoint RUN [--data.root DIR] [--json FILE] [--csv FILE]`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return _say_errors("afa evaluate", lambda: _evaluate(argv))


def _evaluate(argv: Sequence[str]) -> None:
    parser = _parser(
        "afa evaluate",
        "Score a checkpoint against masks: IoU per class, mIoU and pixel accuracy of the CAM, the CAM refined"
        " by PAR, the random-walk label (these know the image-level labels) and the segmentation. Settings"
        " that are not given are those of the run.",
    )
    parser.add_argument("--json", type=str, default=None, help="also write the scores to this JSON file")
    parser.add_argument("--csv", type=str, default=None, help="also write the scores to this CSV file")
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(EvaluateSettings, "eval")
    restored = _restore(argv, "cpu")
    if restored is not None:
        config = to_dict(restored.config)
        known = {action.dest for action in parser._actions}
        defaults = {
            f"{name}.{key}": value for name in ("data", "eval") for key, value in config[name].items()
        }
        parser.set_defaults({key: value for key, value in defaults.items() if key in known})
    options = parser.parse_args(argv)
    data = section(DataSettings, options.data, "data.")
    settings = section(EvaluateSettings, options.eval, "eval.")
    with processes(options.device) as here:
        dataset = EvaluationSet(data)
        result = evaluate(restored.model.to(here.device), dataset, settings)
        if not here.first:
            return
        result.about.update(checkpoint=str(restored.path), iteration=restored.iteration, root=data.root)
        print(f"{restored.path}, trained for {restored.iteration} steps, on {data.val_split} of {data.root}")
        console = Console()
        result.print(console if console.is_terminal else Console(width=120))
        for kind, path in (("json", options.json), ("csv", options.csv)):
            if path is not None:
                getattr(result, f"write_{kind}")(path)
                print(f"wrote {path}")


def predict_main(argv: Sequence[str] | None = None) -> int:
    """`afa predict IMAGE... --checkpoint RUN --out DIR [--head_weights FILE]`."""
    argv = sys.argv[1:] if argv is None else argv
    return _say_errors("afa predict", lambda: _predict(argv))


def _predict(argv: Sequence[str]) -> None:
    parser = _parser(
        "afa predict",
        "Label photographs. For each one a PNG of class indices with the VOC palette, and a panel:"
        " photograph, CAM, affinity of a point, pseudo-label, prediction. Settings that are not given are"
        " those of the run.",
    )
    parser.add_argument(
        "images", nargs="*", type=str, metavar="IMAGE", help="photographs, or folders of them"
    )
    parser.add_argument("--out", type=str, default="predictions", help="folder to write into")
    parser.add_argument(
        "--head_weights",
        type=str,
        default=None,
        metavar="FILE",
        help="draw how much each attention head counts in the affinity as this PNG; photographs may then be left out",
    )
    parser.add_class_arguments(PredictSettings)
    restored = _restore(argv, "cpu")
    if restored is not None:
        known = {action.dest for action in parser._actions}
        of_run = to_dict(restored.config)["eval"]
        parser.set_defaults(
            {key: value for key, value in of_run.items() if key in known and key != "progress"}
        )
    options = parser.parse_args(argv)
    settings = section(PredictSettings, Namespace(**_of(PredictSettings, options)))
    with processes(options.device) as here:
        model = restored.model.to(here.device)
        if options.head_weights is not None:
            title = f"{restored.path.name}, step {restored.iteration}"
            print(f"wrote {draw_head_weights(model, options.head_weights, title)}")
            if not options.images:
                return
        done = predict(model, options.images, options.out, restored.class_names, settings)
    width = max(len(item.image.name) for item in done)
    for item in done:
        found = ", ".join(f"{name} {100 * score:.0f} %" for name, score in item.found) or "nothing"
        print(f"{item.image.name:{width}}  {found}")
    files = "labels and panels" if settings.panels else "labels"
    print(f"wrote {files} of {len(done)} photograph{'s' * (len(done) > 1)} to {Path(options.out)}")


def _of(kind: type, options: Namespace) -> dict[str, object]:
    """Those of the options that are fields of a settings dataclass."""
    return {name: options[name] for name in kind.__dataclass_fields__}
