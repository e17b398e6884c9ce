"""The classes of each photograph of a source folder: by label file, by mask, or by the sub-folder it lies in."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...conventions import IGNORE
from ...errors import AfaError, ConfigError, DataError
from ...runtime.notices import notice
from ...runtime.progress import in_threads
from ..class_file import is_no_class, read_class_file
from ..lists import mask_beside
from ..masks import MaskRules, read_mask
from .annotations import read_annotations
from .photographs import Names, Source

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass
class Said:
    """What is said of the photographs.

    Attributes:
        labels: names of the classes of each photograph of which something is said; maybe none.
        unlabelled: why nothing is known of the others.
        order: of all classes, if there is one.
        problems: lines about labels of no photograph.
    """

    labels: dict[Source, list[str]] = field(default_factory=dict)
    unlabelled: dict[Source, str] = field(default_factory=dict)
    order: Sequence[str] = ()
    problems: list[str] = field(default_factory=list)

    def classes(self) -> list[str]:
        """All classes that a photograph shows, in their order or else by name."""
        there = {label for own in self.labels.values() for label in own}
        ordered = sorted(there, key=lambda name: (name.casefold(), name))
        for one, other in itertools.pairwise(ordered):
            if one.casefold() == other.casefold():
                notice(f"alike {other}", f"classes {one!r} and {other!r} differ in case alone and are two classes")
        return [name for name in self.order if name in there] or ordered


def labels_of(
    sources: Sequence[Source], folder: Path, labels: str | None, masks: str | None, classes: str | None
) -> Said:
    """What the label file, or else the masks, or else the sub-folders of ``folder`` say.

    Raises:
        DataError: they cannot be read; ConfigError: the sub-folders are no classes, or there are none.
    """
    if labels is not None:
        return _of_annotations(sources, folder, Path(labels))
    if masks is not None:
        return _of_masks(sources, Path(masks), given_classes(str(classes)))
    return _of_folders(sources, folder)


def given_classes(said: str) -> list[str]:
    """``cat,dog``, or the names in a file, without the background.

    Raises:
        ConfigError, DataError: no names, or one twice.
    """
    if os.path.isfile(said):
        return list(read_class_file(said)[1:])
    names = [" ".join(name.split()) for name in said.split(",")]
    names = names[1:] if is_no_class(names[0]) else names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names or not all(names):
        what = f"{twice[0]!r} is named twice" if twice and twice[0] else "an empty name"
        raise ConfigError(f"classes: {what} in {said!r}; expected names such as cat,dog, or a file of them")
    return names


def _of_annotations(sources: Sequence[Source], folder: Path, path: Path) -> Said:
    found, names = read_annotations(path), Names(sources)
    said = Said(order=found.order)
    for photo, own in found.labels.items():
        meant = names.of(photo)
        if len(meant) == 1:
            known = said.labels.setdefault(meant[0], [])
            known += [label for label in own if label not in known]
        else:
            which = ", ".join(str(item.inside) for item in meant[:3])
            why = f"it may mean {which}" if meant else f"no such photograph in {folder}"
            said.problems.append(f"{path.name}: {photo!r}: {why}")
    said.unlabelled = {item: f"no label in {path.name}" for item in sources if item not in said.labels}
    return said


def _of_masks(sources: Sequence[Source], folder: Path, classes: Sequence[str]) -> Said:
    if not folder.is_dir():
        raise DataError(f"masks: {folder} is not a folder")
    names = ("background", *classes)
    rules = MaskRules(len(names))

    paths = [mask_beside(folder, str(item.inside.with_suffix(""))) for item in sources]
    owners = Counter(paths)

    def look(path: Path | None) -> list[str] | str:
        if path is None:
            return f"no mask of this name in {folder}"
        if owners[path] > 1:
            return f"{path} may be the mask of {owners[path]} photographs of this name"
        try:
            present = np.unique(read_mask(path, rules).classes).tolist()
        except (AfaError, ValueError) as error:
            text = str(error)
            return text if text.startswith(str(path)) else f"{path}: {text}"
        return [names[number] for number in present if 0 < number != IGNORE]

    said = Said(order=classes)
    for item, found in zip(sources, in_threads(look, paths, "masks")):
        if isinstance(found, str):
            said.unlabelled[item] = found
        else:
            said.labels[item] = found
    return said


def _of_folders(sources: Sequence[Source], folder: Path) -> Said:
    folders = sorted({item.folder for item in sources} - {""})
    if not folders:
        raise ConfigError(
            f"labels: {folder} has no sub-folders whose names could be classes; give a label file, or masks"
        )
    if {name.lower() for name in folders} <= _SPLITS:
        raise ConfigError(
            f"labels: the sub-folders of {folder} ({', '.join(folders)}) are called as splits, not as classes; give one"
            " of them as the source, or a label file"
        )
    said = Said()
    for item in sources:
        if not item.folder:
            said.unlabelled[item] = "no label, as it lies in no sub-folder"
        else:
            said.labels[item] = [] if is_no_class(item.folder) else [" ".join(item.folder.split())]
    return said
