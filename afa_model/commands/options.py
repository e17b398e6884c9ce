"""What the commands that take a checkpoint share: their options, and the run's settings as defaults."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from ..config import Parser
from ..data.settings import DataSettings
from ..errors import AfaError, ConfigError, DataError
from ..runs.restore import Restored, load_model


def parser_of(command: str, description: str) -> Parser:
    """A parser with ``--checkpoint`` and ``--device``."""
    parser = Parser(prog=command, description=description)
    told = "a run's folder (its best checkpoint is taken) or a checkpoint"
    parser.add_argument("--checkpoint", type=str, required=True, help=told)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    return parser


def positionals_first(argv: Sequence[str]) -> list[str]:
    """The line with what belongs to no option before all options, wherever it stood; behind ``--`` nothing is one."""
    words, options, others = iter(argv), [], []
    for word in words:
        if word == "--":
            others += words
        elif word in ("-h", "--help") or (word.startswith("--") and "=" in word):
            options.append(word)
        elif word.startswith("--"):
            options += [word, *itertools.islice(words, 1)]
        else:
            others.append(word)
    return [*(f"./{word}" if word.startswith("-") else word for word in others), *options]


def switched_on(argv: Sequence[str], option: str) -> list[str]:
    """The line with a lone ``option`` as ``option=true``; ``true`` or ``false`` behind it is its value."""
    end = argv.index("--") if "--" in argv else len(argv)
    valued = [*argv[1:end], ""]
    words = [
        f"{option}=true" if word == option and after not in ("true", "false") else word
        for word, after in zip(argv[:end], valued)
    ]
    return [*words, *argv[end:]]


def given(argv: Sequence[str], option: str) -> str | None:
    """The value of an option, read before all else, for others' defaults depend on it."""
    for position, word in enumerate(argv):
        if word == option and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the line is there to be explained."""
    return not {"-h", "--help"}.isdisjoint(argv)


def restored(argv: Sequence[str]) -> Restored | None:
    """The model of ``--checkpoint``, on the CPU; None where the line asks for help or names none."""
    wanted = not asks_for_help(argv) and given(argv, "--checkpoint")
    return load_model(wanted) if wanted else None


def set_defaults(parser: Parser, values: Mapping[str, Any]) -> None:
    """Those of the values that the parser has a setting for become its defaults."""
    known = set(parser.known_settings())
    parser.set_defaults({key: value for key, value in values.items() if key in known})


def part(kind: type, options: Namespace) -> Namespace:
    """Those of the options that are fields of a settings dataclass."""
    return Namespace(**{name: options[name] for name in kind.__dataclass_fields__})


@contextlib.contextmanager
def told_of_the_run(run: Restored, data: DataSettings) -> Iterator[None]:
    """What is wrong with data whose relative root is the checkpoint's is told with where that came from."""
    try:
        yield
    except DataError as error:
        root = data.root
        if os.path.isabs(root) or root != run.config.data.root or run.folder == os.getcwd():
            raise
        where = f"in {run.folder}: --data.root {os.path.join(run.folder, root)}" if run.folder else "in another folder"
        raise DataError(
            str(error), [f"data.root {root} is what the checkpoint {run.path} says; its run was started {where}"]
        ) from error


@contextlib.contextmanager
def mistakes_named() -> Iterator[None]:
    """A ValueError inside is about what was asked for, and names it."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, AfaError):
            raise
        raise ConfigError(str(error)) from error
