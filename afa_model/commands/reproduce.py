"""`afa reproduce`: the tables of the paper's supplement, our numbers beside its own."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from ..config import Config, parse, section, to_dict
from ..config.parser import build, parser, resolve_config_names
from ..data.synthetic import synthetic_data
from ..errors import ConfigError
from ..reproduce.paper import tables_named
from ..reproduce.report import write_report
from ..reproduce.results import in_words, results_of
from ..reproduce.show import notes, terminal_tables
from ..reproduce.sweep import Sweep, SweepSettings, each_alone, work_off
from ..runtime.writing import writable_file, writable_folder
from .options import part, positionals_first, switched_on

# The published run in one process, for rows are what is shared out; what must be given has no default.
FULL = {
    "out": "runs/reproduce",
    "data": {"root": ""},
    "loader": {"batch_size": 4},
    "model": {"pretrained": ""},
    "checkpoint": {"keep_last": 1},
}


def main(argv: Sequence[str]) -> int:
    """`afa reproduce TABLE... [--quick] [--data.root DIR] [--seeds N] [--shard I/N] [--report FILE.md]`."""
    options, quick = _parsed(argv)
    settings = section(SweepSettings, part(SweepSettings, options))
    tables = tables_named(options.tables, quick)
    config = build(options)
    if config.resume not in ("never", "auto"):
        raise ConfigError(f"resume: rows go on from their own checkpoints, got {config.resume!r}")
    seeds = list(range(config.seed, config.seed + settings.seeds))
    given = settings.cam_checkpoint and Path(settings.cam_checkpoint).expanduser()
    needed = given is None or not all(table.refines for table in tables)
    config = _with_data(config) if quick else _full(config, needed)
    sweep = Sweep(config, tables, seeds, given)
    if not quick:
        sweep.check_classes()
    sweep.check_lists()
    writable_folder(config.out, "out")
    report = settings.report and writable_file(settings.report, "report")
    index, count = settings.share()
    pieces = sweep.pieces()[index::count]
    with each_alone():
        share = f"share {index + 1} of {count}: " if count > 1 else ""
        problems = work_off(pieces, lambda line: print(f"{share}{line}", flush=True))
    found = [results_of(sweep, table) for table in tables]
    if count == 1 or all(results.complete for results in found):
        _show(found)
    else:
        print(f"{share}done; when all are, the same line without --shard prints the tables")
    if report:
        files = write_report(report, sweep, found, f"afa reproduce {shlex.join(_told(argv))}")
        print(f"wrote {files[0]} and {len(files) - 1} plot{'s' * (len(files) != 2)} in {files[-1].parent}")
    if problems:
        print(f"{share}{len(problems)} could not be done:", *problems, sep="\n  ", file=sys.stderr)
    return 1 if problems else 0


def _parsed(argv: Sequence[str]) -> tuple[Namespace, bool]:
    """All options, and whether they ask for a quick run, whose configuration they then start from."""
    argv = positionals_first(switched_on(argv, "--quick"))
    argv = [_own_checkpoint(word) for word in argv]
    quick = "--quick=true" in argv or ("--quick", "true") in itertools.pairwise(argv)
    defaults = to_dict(parse(["--config", "quick" if quick else "voc"]))
    for key, value in {} if quick else FULL.items():
        defaults[key] = {**defaults[key], **value} if isinstance(value, dict) else value
    what = (
        "The tables of the paper's supplement: train and score every row, print our numbers beside the paper's. A line"
        " that was stopped goes on when it is given again; several processes share the rows out, under torchrun or by"
        " --shard. TABLE is table1 ... table6 or all."
    )
    made = parser("afa reproduce", what, defaults)
    made.usage = "afa reproduce TABLE... [--quick] [--data.root DIR] [--seeds N] [--SECTION.KEY VALUE ...]"
    made.add_argument("tables", nargs="*", metavar="TABLE", help="table1 ... table6, or all")
    made.add_class_arguments(SweepSettings)
    return made.parse_args(resolve_config_names(argv)), quick


def _own_checkpoint(word: str) -> str:
    """``--checkpoint`` alone is the network of tables 2 and 3, as of other commands; --checkpoint.KEY is a run's."""
    name, equals, value = word.partition("=")
    return f"--cam_checkpoint{equals}{value}" if name == "--checkpoint" else word


def _with_data(config: Config) -> Config:
    """Of a quick run: pictures that are there, or else generated, in the cache or the folder that is given."""
    root = Path(config.data.root)
    if config.data.root and root.is_dir() and any(root.iterdir()):
        return config
    return _at(config, data={"root": str(synthetic_data(root=config.data.root or None))})


def _full(config: Config, trains: bool) -> Config:
    """
    Raises:
        ConfigError: what the full reproduction needs is not given.
    """
    if not config.data.root:
        raise ConfigError(
            "data.root: the full reproduction needs PASCAL VOC 2012 (--data.root VOC2012); --quick runs on generated"
            " pictures"
        )
    if config.model.pretrained == "":
        if trains:
            raise ConfigError(
                "model.pretrained: the full reproduction starts from ImageNet weights (--model.pretrained mit_b1.pth);"
                " false trains from scratch"
            )
        config = _at(config, model={"pretrained": False})
    return config


def _at(config: Config, **sections: dict[str, Any]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def _show(found: Sequence[Any]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for results in found:
        for table in terminal_tables(results):
            console.print(table)
        console.print(" ".join([in_words(results), *notes(results)]), markup=False, highlight=False)
        console.print()


def _told(argv: Sequence[str]) -> list[str]:
    """The line as the report shows it: without where the report itself goes."""
    words = list(argv)
    for number, word in enumerate(words):
        if word == "--report":
            return words[:number] + words[number + 2 :]
        if word.startswith("--report="):
            return words[:number] + words[number + 1 :]
    return words
