"""Settings from YAML, dotted options and checkpoints; every mistake is one line that names the key."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from ..errors import ConfigError
from .config import Config, check, scaled, sections
from .renamed import RENAMED, flatten, with_new_names

Settings = TypeVar("Settings")

CONFIG_FOLDER = Path(__file__).parent


class Parser(ArgumentParser):
    """Raises errors as ConfigError, in one line that names the key; suggests one for an unknown key."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments, allow_abbrev=False)  # a shortened key is an unknown key

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(self._readable(str(message))) from ex

    def format_help(self) -> str:
        """Docstrings mark code with double backquotes; a terminal shows it plain."""
        return super().format_help().replace("``", "")

    def _readable(self, message: str) -> str:
        """jsonargparse's words, with the key in front."""
        if match := re.search(r"arguments are required: ([\w.]+)", message):
            named = {action.metavar for action in self._actions if not action.option_strings}
            dashes = "" if match[1] in named or match[1].upper() in named else "--"
            return f"{dashes}{match[1]} is required ({self._help_of(match[1])})"
        if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            return self._unknown(f"{match[1]}.{match[2]}")
        if match := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            return self._unknown(match[1])
        if match := re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message):
            return self._unknown(match[1])
        wrong_type = r'Parser key "([\w.]+)":\s*Expected (?:a |an )?(.*?)\. Got value: (.*)'
        if match := re.search(wrong_type, message, re.S):
            wanted = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
            hint = " (a list is written [1, 0.5])" if "tuple" in wanted else ""
            return f"{match[1]}: expected {wanted}, got {match[3].strip()}{hint}"
        several = r'Parser key "([\w.]+)":.*?Union subtypes\s*Subtypes: \[(.*?)\]\s*Errors:.*Given value: (.*)'
        if match := re.search(several, message, re.S):
            wanted = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "").replace("NoneType", "null")
            wanted = wanted.replace(", null", " or null")
            hint = " (a list is written [1, 0.5])" if "tuple" in wanted else ""
            return f"{match[1]}: expected {wanted}, got {match[3].strip()}{hint}"
        return " ".join(message.split())

    def known_settings(self) -> list[str]:
        """Every key that the parser takes, dotted."""
        return [action.dest for action in self._actions]

    def of_the_run(self, keys: Sequence[str]) -> None:
        """For the help: where none is given these have the value of the run that ``--checkpoint`` names."""
        for action in self._actions:
            if action.dest in keys or action.dest.partition(".")[0] in keys:
                action.default = "the run's"

    def _help_of(self, key: str) -> str:
        return next((action.help for action in self._actions if action.dest == key and action.help), "no default")

    def _unknown(self, key: str) -> str:
        known = self.known_settings()
        if key in RENAMED:
            now = RENAMED[key]
            return f"{key}: unknown setting (" + (f"it is {now} now)" if now else "there is one value for all)")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        return f"{key}: unknown setting" + (f" (did you mean {near[0]}?)" if near else "")


def parser(prog: str, description: str, defaults: Mapping[str, Any] | None = None) -> ArgumentParser:
    """A parser that knows ``--config FILE|NAME``, ``--print_config`` and a dotted option for every setting.

    Args:
        defaults: nested settings to start from instead of the built-in ones (those of a checkpoint).
    """
    usage = f"{prog} [--config FILE|NAME] [--SECTION.KEY VALUE ...]"
    result = Parser(prog=prog, usage=usage, description=description)
    result.add_argument(
        "--config", action="config", help=f"YAML file, or the name of a packaged one: {', '.join(packaged())}"
    )
    result.add_class_arguments(Config)
    if defaults:
        result.set_defaults(flatten(defaults))
    return result


def packaged() -> list[str]:
    """Names of the configurations that come with the project."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(name: str) -> str:
    """The file ``name`` stands for: a path, or (with or without ``.yaml``) a packaged configuration.

    Raises:
        ConfigError: there is neither, or the file holds no settings.
    """
    if Path(name).expanduser().is_file():
        path = os.path.expanduser(name)
        _check_file(path)
        return path
    known = CONFIG_FOLDER / f"{Path(name).stem}.yaml"
    if Path(name).name == name and known.is_file():
        return str(known)
    raise ConfigError(
        f"config: no file {name!r}, and no packaged configuration of that name ({', '.join(packaged())})"
    )


def _check_file(name: str) -> None:
    """jsonargparse's words for a file without settings are none at all."""
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"config: {name} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {name} is not YAML: {' '.join(str(error).split())}") from None
    expected = "expected settings such as data: {root: FOLDER}"
    if content is None:
        raise ConfigError(f"config: {name} is empty, {expected}")
    if not isinstance(content, dict):
        raise ConfigError(f"config: {name} holds a {type(content).__name__}, {expected}")
    empty = [key for key in sections(Config()) if key in content and content[key] is None]
    if empty:
        raise ConfigError(f"{empty[0]}: no settings under it in {name} (leave the line out, or write {empty[0]}: {{}})")


def resolve_config_names(argv: Sequence[str]) -> list[str]:
    """``argv`` with the names after ``--config`` replaced by the files they stand for."""
    result, previous = [], ""
    for word in argv:
        if previous == "--config":
            word = find_config(word)
        elif word.startswith("--config="):
            word = "--config=" + find_config(word.removeprefix("--config="))
        result.append(word)
        previous = word
    return result


def build(settings: Namespace) -> Config:
    """Parsed settings -> checked :class:`Config`.

    Raises:
        ConfigError: a value makes no sense.
    """
    values = {item.name: settings[item.name] for item in dataclasses.fields(Config)}
    for name, part in sections(Config()).items():
        values[name] = section(type(part), values[name], f"{name}.")
    _refuse_null(Config, values, "")
    return check(scaled(Config(**values)))


def section(kind: type[Settings], values: Namespace, prefix: str = "") -> Settings:
    """Parsed values -> a settings dataclass, whose own checks do not know the key it stands under.

    Raises:
        ConfigError: a value makes no sense; ``prefix`` is put before the message.
    """
    if not isinstance(values, Namespace):
        raise ConfigError(f"{prefix[:-1]}: expected settings ({prefix}KEY), got {values!r}")
    given = values.as_dict()
    _refuse_null(kind, given, prefix)
    for name, inner in get_type_hints(kind).items():
        if dataclasses.is_dataclass(inner):
            given[name] = section(inner, values[name], f"{prefix}{name}.")
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{prefix}{error}") from error


def _refuse_null(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    """jsonargparse takes null for "not given" whatever the type; only a type with None in it may be null."""
    types = get_type_hints(kind)
    for name, value in values.items():
        if value is None and type(None) not in get_args(types[name]):
            raise ConfigError(
                f"{prefix}{name}: expected {getattr(types[name], '__name__', types[name])}, got null"
            )


def parse(
    argv: Sequence[str],
    prog: str = "afa train",
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Command line -> checked :class:`Config`. ``--help`` and ``--print_config`` print and exit.

    Raises:
        ConfigError: an unknown setting, a wrong type, a value that makes no sense; the message names the key.
    """
    return build(parser(prog, description, defaults).parse_args(resolve_config_names(argv)))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data (for YAML and checkpoints)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The reverse of :func:`to_dict`, with every check of :func:`parse`; names of earlier versions are understood."""
    return build(parser("afa", "").parse_object(with_new_names(values)))


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that ``--config`` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
