"""What goes wrong in the user's hands. A command prints such an error in one line and exits with its code."""

from __future__ import annotations

from collections.abc import Sequence


class AfaError(Exception):
    """Whatever a user can mend; the message says what and how.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 2


class ConfigError(AfaError, ValueError):
    """A setting that is unknown, of the wrong type or makes no sense; the message names its key."""


class DataError(AfaError):
    """What is wrong with a data set, all of it: ``problems`` is a list of lines, each naming a file."""

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.problems = list(problems)
        super().__init__("\n  ".join([what, *self.problems]))


class CheckpointError(AfaError, RuntimeError):
    """A checkpoint that is missing, broken, or of another model; or the processes found different ones."""


class SavingError(CheckpointError):
    """A checkpoint that cannot be written: the disk is full, or the folder gone."""

    exit_code = 1


class TrainingError(AfaError, RuntimeError):
    """Training cannot go on; the message says why and what was saved."""

    exit_code = 1  # nothing was asked wrongly: the run itself failed
