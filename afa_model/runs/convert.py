"""Weights from one layout of names, and one kind of file, into another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import to_dict
from ..conventions import require
from ..data.class_file import read_class_file
from ..errors import CheckpointError, ConfigError, SavingError, naming, reason
from ..networks.afa import AFA
from ..networks.layouts import renamed
from ..runtime.tensor_files import write_tensors
from ..runtime.writing import writable_file, writable_folder
from . import checkpoint
from .sources import Differences, Source, grouped, read_source

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_BACKBONES = ("mit", "huggingface", "mmseg")
_WITH_SETTINGS = ("afa", "hub")


@dataclass
class ConvertSettings:
    """What is made of the weights.

    Args:
        to: public (weights by the names of the public AFA code, of a backbone alone by those of mit_b*.pth), afa (a
            checkpoint of this project, with settings and class names, for evaluation and prediction), hub (a folder
            with model.safetensors, config.json and a card), or the backbone alone by the names of mit (mit_b*.pth),
            huggingface (nvidia/mit-b*) or mmseg (mmsegmentation).
        prefix: what is put before every name, such as module. or backbone.
        partial: convert what fits, where tensors are missing, unknown or of another shape.
        classes: text file with the names of the classes, one a line; null takes the source's, of public weights those
            of VOC or COCO by their number. With --to afa or hub, as the two below.
        stride: of the four patch embeddings; null takes the source's, of public weights the published ones.
        pooling: gmp or gap; null likewise.
        scores: file that `afa evaluate --json` wrote, for the card of --to hub.
    """

    to: Literal["public", "afa", "hub", "mit", "huggingface", "mmseg"] = "public"
    prefix: str = ""
    partial: bool = False
    classes: str | None = None
    stride: tuple[int, int, int, int] | None = None
    pooling: Literal["gmp", "gap"] | None = None
    scores: str | None = None

    def __post_init__(self) -> None:
        settings = self.to in _WITH_SETTINGS
        wanted = f"none with --to {self.to}, whose names are fixed" if settings else "words with a dot behind each"
        require(not self.prefix or (self.prefix.endswith(".") and not settings), "prefix", wanted, self.prefix)
        for name in ("classes", "stride", "pooling"):
            given = getattr(self, name)
            require(given is None or settings, name, f"none with --to {self.to}, which holds weights alone", given)
        require(self.scores is None or self.to == "hub", "scores", "none but with --to hub", self.scores)


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        found: the source, in words.
        target: the file or folder.
        count: tensors in it.
        left_out: of the source, grouped: what the target has no place for.
        differences: of a source that is not whole, of which what fits was converted.
        same: whether all tensors, read from the target again, are the source's bit for bit.
    """

    found: str
    target: Path
    count: int
    left_out: str
    differences: Differences
    same: bool


def convert(source: str | Path, target: str | Path, settings: ConvertSettings | None = None) -> Converted:
    """Read weights of any known kind from ``source`` and write them to ``target`` as the settings say.

    Raises:
        CheckpointError: the source holds no such weights, or, without ``partial``, more or less than a model has.
        ConfigError: the target is of another kind than asked for, or cannot be written.
    """
    settings = settings or ConvertSettings()
    given, target = Path(source).expanduser(), Path(target).expanduser()
    found = read_source(given)
    target = _checked(target, settings)
    if given.resolve() == target.resolve():
        raise ConfigError(f"target: {target} is the source itself")
    if settings.to == "public":
        found.require_mit("which the public AFA code is for")
    part = found.backbone() if settings.to in _BACKBONES else found
    if settings.to in _WITH_SETTINGS and not found.whole:
        raise ConfigError(f"to: {settings.to} is for a whole AFA, but {given} holds a {found.title}")
    differences = Differences.of(part)
    if differences.lines():
        _refuse(given, part, differences, settings)
        part = part.fitting()
    heads = [name for name in part.state if settings.to == "mmseg" and name.startswith("head.")]
    part = replace(part, state={name: value for name, value in part.state.items() if name not in heads})
    if settings.to == "afa":
        _write_checkpoint(target, _with_settings(part, settings))
    elif settings.to == "hub":
        _write_folder(target, _with_settings(part, settings), settings)
    else:
        names = part.state if part.whole else renamed(part.state, "mit" if settings.to == "public" else settings.to)
        write_tensors(target, {settings.prefix + name: value for name, value in names.items()})
    same = bool(differences.lines()) or _same(part.state, read_source(target).state)
    alone = found.whole and not part.whole  # the backbone of an AFA
    left = heads + [name for name in found.state if alone and not name.startswith("encoder.")]
    return Converted(found.title, target, len(part.state), grouped(left) if left else "", differences, same)


def _checked(target: Path, settings: ConvertSettings) -> Path:
    """The target, which can be written and has the ending of its kind."""
    if settings.to == "hub":
        if target.suffix in SUFFIXES:
            raise ConfigError(f"target: expected a folder with --to hub, got {target}")
        return writable_folder(target, "target")
    suffixes = SUFFIXES[:2] if settings.to == "afa" else SUFFIXES
    if target.suffix not in suffixes:
        other = "" if target.suffix else " (--to hub writes a folder)"
        raise ConfigError(
            f"target: expected a file that ends in {', '.join(suffixes)} with --to {settings.to}, got {target}{other}"
        )
    return writable_file(target, "target")


def _refuse(given: Path, source: Source, differences: Differences, settings: ConvertSettings) -> None:
    """Stop where the source is not what it seems, unless what fits is asked for and enough."""
    whole = settings.to in _WITH_SETTINGS and (differences.missing or differences.shapes)
    if settings.partial and not whole:
        return
    advice = f"--to {settings.to} needs a whole model" if whole else "--partial converts what fits"
    lines = "\n  ".join(differences.lines())
    raise CheckpointError(f"{given} is nearly {source.title}, but ({advice}):\n  {lines}")


def _with_settings(source: Source, settings: ConvertSettings) -> Source:
    """The source with the settings in place of its own."""
    config, arguments = source.config, source.model.arguments
    names = source.names if settings.classes is None else read_class_file(settings.classes)
    count = arguments["num_classes"]
    if len(names) != count:
        raise ConfigError(f"classes: {settings.classes} names {len(names)} classes, the weights have {count}")
    for name in ("stride", "pooling"):
        value = getattr(settings, name)
        if value is not None:
            setattr(config.model, name, value)
            arguments[name] = list(value) if name == "stride" else value
    config.model.pretrained = False
    return Source(source.title, source.state, source.model, [], config, names, source.about, source.best)


def _write_checkpoint(target: Path, source: Source) -> None:
    state = {
        "format": checkpoint.FORMAT,
        "model": {name: value.contiguous().clone() for name, value in source.state.items()},
        "progress": {"iteration": source.about.get("iteration"), "best": source.best},
        "config": to_dict(source.config),
        "class_names": list(source.names),
        "torch": str(torch.__version__),
    }
    checkpoint.write_atomically(target, state)


def _write_folder(target: Path, source: Source, settings: ConvertSettings) -> None:
    model = AFA(**source.model.arguments)
    model.load_state_dict(source.state, assign=True)  # of whatever type they are
    model.class_names, model.about = source.names, dict(source.about)
    if "run" in model.about:  # of a run, whose settings are as they are now
        model.about["run"]["model"] |= {"stride": model.arguments["stride"], "pooling": model.pooling}
    if settings.scores is not None:
        model.about["scores"] = read_scores(settings.scores)
    try:
        model.save_pretrained(target)
    except OSError as error:
        raise SavingError(f"could not write {target}: {reason(error)}") from error


def read_scores(path: str | Path) -> dict[str, Any]:
    """What a card says, from a file of `afa evaluate --json`.

    Raises:
        ConfigError: it is none.
    """
    path = Path(path).expanduser()
    with naming(path, "scores", ConfigError, is_not="is no file that `afa evaluate --json` wrote"):
        content = json.loads(path.read_text(encoding="utf-8"))
        miou = {kind: round(100 * scores["miou"], 2) for kind, scores in content["scores"].items()}
        about = content["about"]
        return {
            "protocol": about["settings"]["protocol"],
            "split": Path(about["split"]).name,
            "images": content["images"],
            "miou": miou,
        }


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all of ours are among theirs, equal."""
    return all(name in theirs and _bits(ours[name], theirs[name]) for name in ours)


def _bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and bits (NaN too)."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.cpu().eq(b.cpu()) | a.cpu().isnan()).all())
