"""What goes wrong in the user's hands. A command prints such an error in one line and exits with its code."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence


class AfaError(Exception):
    """Whatever a user can mend; the message says what and how.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 2


class ConfigError(AfaError, ValueError):
    """A setting that is unknown, of the wrong type or makes no sense; the message names its key."""


class DataError(AfaError):
    """What is wrong with a data set, all of it: ``problems`` is a list of lines, each naming a file.

    The message shows the first 20 of them; where there are more, it names a temporary file that has all.
    """

    SHOWN = 20

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.what, self.problems = what, list(problems)
        self._list: str | None = None
        super().__init__(what, self.problems)

    def __str__(self) -> str:
        lines = [self.what, *self.problems[: self.SHOWN]]
        more = len(self.problems) - self.SHOWN
        if more > 0:
            lines.append(f"... and {more} more; {self._written()}")
        return "\n  ".join(lines)

    def _written(self) -> str:
        """Where the whole list is; written when it is asked for, since many an error is never shown."""
        if self._list is None:
            try:
                with tempfile.NamedTemporaryFile(
                    "w", prefix="afa-problems-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
                ) as file:
                    file.write("\n".join([self.what, *self.problems]) + "\n")
                self._list = f"all of them are in {file.name}"
            except OSError as error:
                self._list = f"they could not be written to a file ({error})"
        return self._list


class CheckpointError(AfaError, RuntimeError):
    """A checkpoint that is missing, broken, or of another model; or the processes found different ones."""


class SavingError(CheckpointError):
    """A checkpoint that cannot be written: the disk is full, or the folder gone."""

    exit_code = 1


class TrainingError(AfaError, RuntimeError):
    """Training cannot go on; the message says why and what was saved."""

    exit_code = 1  # nothing was asked wrongly: the run itself failed


class ProcessError(AfaError, RuntimeError):
    """Another one of the processes that train together ended, or did not answer in time."""

    exit_code = 1


# What `import` calls the packages that pip install 'afa[train]' brings: all that afa_model needs besides torch.
OF_TRAIN = {
    "PIL",
    "huggingface_hub",
    "jsonargparse",
    "matplotlib",
    "numpy",
    "rich",
    "safetensors",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "yaml",
}


# And what that of pip install 'afa[serve]' besides.
OF_SERVE = {"gradio", "starlette"}


class MissingError(AfaError, ModuleNotFoundError):
    """A package that pip was not asked for; the message has the command that brings it."""


@contextlib.contextmanager
def missing_named() -> Iterator[None]:
    """An import that fails inside, of what the extras ``train`` or ``serve`` bring, says how to install that.

    Raises:
        MissingError: in place of the ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingError) or package not in OF_TRAIN | OF_SERVE:
            raise
        extra = "train" if package in OF_TRAIN else "serve"
        why = "the operators need torch only, all else more" if extra == "train" else "afa serve shows its page with it"
        told = f"{package} is not installed ({why}): pip install 'afa[{extra}]'"
        raise MissingError(told, name=error.name) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the system's own words where there are any (a library raises an error of its own
    on top), and the kind of error before words that say nothing alone, such as a KeyError's ``101``.
    """
    innermost = error
    while not isinstance(innermost, OSError) and (innermost.__cause__ or innermost.__context__) is not None:
        innermost = innermost.__cause__ or innermost.__context__
    if isinstance(innermost, OSError):
        return innermost.strerror or " ".join(str(innermost).split()) or type(innermost).__name__
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return words if " " in words and not isinstance(error, KeyError) else f"{kind} {words}".strip()


@contextlib.contextmanager
def naming(
    path: str | os.PathLike, what: str = "file", kind: type[AfaError] = DataError, is_not: str = "cannot be read"
) -> Iterator[None]:
    """Whatever goes wrong inside goes wrong with the file ``path``, and is told so: ``WHAT PATH IS_NOT: REASON``.

        with naming(path, "mask"):
            Image.open(path).load()

    Broken bytes lead a decoder to raise anything at all. An error of this project has named its file already.

    Raises:
        kind: in place of any other exception.
    """
    try:
        yield
    except AfaError:
        raise
    except Exception as error:
        raise kind(f"{what} {path} {is_not}: {reason(error)}") from error
