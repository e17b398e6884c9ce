"""The command `afa`: finds the subcommand, imports it, hands it the rest of the line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .errors import AfaError, ConfigError, DataError, missing_named
from .runtime.machine import share_the_machine

# name -> what it does; commands/NAME.py (_ for -) has a `main` that takes the rest of the line, may return an exit code
COMMANDS = {
    "prepare": "make a data set of any photographs, or of VOC, SBD or COCO, that `afa train` takes as it is",
    "train": "train on a data set in VOC layout, set up by YAML and dotted options",
    "evaluate": "score a checkpoint: CAM, refined CAM, random walk, segmentation",
    "predict": "label photographs: a palette PNG and an explaining panel for each",
    "pseudo-labels": "labels, CAMs and random walks of many photographs as files, to train a second network on",
    "refine": "refine CAMs and label maps that are there as files, by dense CRF, PAR or PAMR",
    "figures": "draw the figures of the paper's supplement, of your own models and photographs",
    "serve": "a page on this machine: what a model sees in a photograph, or what refinements make of a mask",
    "reproduce": "the tables of the paper's supplement: train and score each row, our numbers beside the paper's",
    "convert": "weights into other names and files: public, SegFormer, mmsegmentation, Hugging Face, a Hub folder",
    "export": "the segmentation network as ONNX, TorchScript or a torch.export program, run beside PyTorch",
    "demo": "generate a data set, train on it from scratch, show what each part adds",
    "doctor": "what is installed, which backends run here, and why the others do not",
    "bench": "measure operators, training step or data loading",
}
# name -> words that may follow it
SUBCOMMANDS = {"bench": ("data",), "prepare": ("folder", "voc", "sbd", "coco")}


def usage() -> str:
    """What `afa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: afa COMMAND [OPTION...]",
            "",
            "Weakly-supervised semantic segmentation with transformers: affinity from attention (AFA).",
            "",
            *lines,
            "",
            "`afa COMMAND --help` lists a command's options. Start with `afa doctor` and `afa demo`.",
        ]
    )


def _with_underscores(word: str) -> str:
    """``--affinity-at=1,2`` as ``--affinity_at=1,2``: options may be written either way, values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _tell(argv: Sequence[str], error: AfaError) -> None:
    """The mistake in one line. In settings and data all processes find the same one, and the first tells; what goes
    wrong with files or numbers may be one process's alone.
    """
    if isinstance(error, (ConfigError, DataError)):
        from .runtime.processes import announced_rank

        if announced_rank() > 0:
            return
    part = [word for word in argv[1:2] if word in SUBCOMMANDS.get(argv[0], ())]
    print(f"afa {' '.join([argv[0], *part])}: error: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `afa`; returns the exit code (2 for a mistake in what was asked)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from afa_kernels import __version__

        print(f"afa {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"afa: error: no command {argv[0]!r} (there are {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    share_the_machine()  # before a command loads torch, and with it libgomp
    try:
        end = argv.index("--") if "--" in argv else len(argv)
        with missing_named():
            command = importlib.import_module(f"afa_model.commands.{argv[0].replace('-', '_')}")
            return command.main([*map(_with_underscores, argv[1:end]), *argv[end:]]) or 0
    except AfaError as error:
        _tell(argv, error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `afa ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
