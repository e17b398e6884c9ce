"""The tables of the paper's supplement as data: ``paper.yaml`` holds every number of theirs and what each row sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

FILE = Path(__file__).with_name("paper.yaml")
EVERY = "all"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: what tables call it.
        paper: the paper's mIoU in percent; None where it has none.
        settings: dotted settings of the row, on top of a configuration.
        default: the paper's own choice.
    """

    name: str
    paper: float | None
    settings: Mapping[str, Any]
    default: bool = False


@dataclass(frozen=True)
class PerClass:
    """The paper's table of classes: names as it has them, and of each method the IoU of every class and the mIoU."""

    classes: tuple[str, ...]
    methods: Mapping[str, tuple[float, ...]]
    miou: Mapping[str, float]


@dataclass(frozen=True)
class PaperTable:
    """A table of the supplement.

    Attributes:
        name: ``table1`` ... ``table6``.
        title: what it is about.
        split: ``train`` or ``val``: what it is scored on.
        protocol: of the evaluation, ``training`` or ``test``; None: of refinements of one network's CAM, whose classes
            are known.
        kinds: label maps that are scored, the one of the paper's number first; none for refinements.
        rows: in the paper's order.
        scaled: what the settings of a quick run have otherwise than the paper's, in words.
        per_class: of table 6.
    """

    name: str
    title: str
    split: str
    protocol: str | None
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]
    scaled: str | None = None
    per_class: PerClass | None = None

    @property
    def refines(self) -> bool:
        """Whether its rows are refinements of one CAM, and not networks of their own."""
        return self.protocol is None

    @property
    def number(self) -> str:
        """``Table 1`` of ``table1``."""
        return self.name.replace("table", "Table ")


@lru_cache(maxsize=1)
def content() -> Mapping[str, Any]:
    """``paper.yaml`` as it is."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def paper_table(name: str, quick: bool = False) -> PaperTable:
    """A table of the supplement; ``quick``: with the settings of small pictures."""
    table = content()[name]

    rows = tuple(
        Row(row["name"], row["paper"], {**_of(table, quick), **_of(row, quick)}, row.get("default", False))
        for row in table["rows"]
    )
    classes = table.get("per_class")
    per_class = classes and PerClass(
        tuple(classes["classes"]), {name: tuple(iou) for name, iou in classes["methods"].items()}, classes["miou"]
    )
    return PaperTable(
        name,
        table["title"],
        table["split"],
        table.get("protocol"),
        tuple(table.get("kinds", ())),
        rows,
        table.get("scaled") if quick else None,
        per_class,
    )


def _of(part: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """What a table or a row sets."""
    return {**part.get("set", {}), **(part.get("quick", {}) if quick else {})}


def tables_named(words: Sequence[str], quick: bool = False) -> list[PaperTable]:
    """The tables that these words ask for, each once, in the paper's order.

    Raises:
        ConfigError: there is no such table, or none is asked for.
    """
    known = (*content(), EVERY)
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        asked = f"no table {unknown[0]!r}" if unknown else "no table is asked for"
        raise ConfigError(f"{asked}: expected some of {', '.join(known)}")
    return [paper_table(name, quick) for name in content() if name in words or EVERY in words]
