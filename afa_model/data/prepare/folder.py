"""Any pile of photographs -> a data set with image-level labels alone, which training takes as it is.

The labels are from the names of sub-folders, from a label file, or from the classes that masks hold; no pixel labels
are kept. What stands in the prepared folder:

    JPEGImages/NAME.jpg                           the photographs, upright, RGB or grey
    ImageSets/Segmentation/{train_aug,val}.txt    their names
    cls_labels.json                               {NAME: [class, ...]}
    classes.txt                                   the classes, background first
    prepare.json                                  what was made of which file; a later run goes on from it
    refused.txt                                   what was not taken, and why
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...conventions import require
from ...errors import AfaError, ConfigError, DataError, reason
from ...runtime.notices import notice
from ...runtime.progress import in_threads
from ...runtime.writing import writable_folder
from ..files import digest
from ..photographs import MAX_PIXELS
from ..texts import lines_of
from .labels import Said, given_classes, labels_of
from .photographs import Names, Source, copy_photograph, free_name, photographs_in
from .record import Photograph, Record, class_lines, read_record, write_labels, write_lines
from .split import validation_share

TRAIN, VAL, REFUSED = "train_aug", "val", "refused.txt"
_LISTS = "ImageSets/Segmentation"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_LARGE = 1500  # pixels of a longer side of which a training crop sees little


@dataclass
class FolderSettings:
    """What a pile of photographs becomes.

    Args:
        labels: file with the classes of each photograph: .csv (file,label;label), .json ({file: [labels]} or a list of
            {"file", "labels"}), COCO .json, CVAT .xml; or a folder of LabelMe's .json or VOC's .xml. Not given: the
            sub-folder that a photograph lies in is its class.
        masks: folder of masks called as the photographs, in the place of labels; the classes in them count.
        classes: names of the classes in the order of their numbers, cat,dog or a file of one name a line; other
            classes are left out. Not given: all there are, by name. Masks need it.
        val: share of each class to keep for validation, 0 to below 1, or a list of files. Not given: 0.1, or as in the
            run before.
        seed: of the share.
        long_side: shrink photographs whose longer side has more pixels than this; null leaves them as large as they
            are.
        allow_empty: take photographs that show none of the classes, too (train with --data.allow_empty true).
        max_pixels: refuse photographs of more pixels than this; null refuses none.
    """

    labels: str | None = None
    masks: str | None = None
    classes: str | None = None
    val: str | None = None
    seed: int = 0
    long_side: int | None = None
    allow_empty: bool = False
    max_pixels: int | None = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("labels", "masks", "classes", "val"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        both = self.labels is not None and self.masks is not None
        require(not both, "masks", "no labels beside them", self.masks)
        require(self.masks is None or self.classes is not None, "masks", "classes with them (names by number)", "none")
        require(self.long_side is None or self.long_side >= 16, "long_side", "at least 16 or null", self.long_side)
        enough = self.max_pixels is None or self.max_pixels >= 1
        require(enough, "max_pixels", "at least 1 or null", self.max_pixels)
        self.share()

    def share(self) -> float | None:
        """The share to keep for validation; None: a list says which."""
        try:
            share = float(self.val if self.val is not None else 0.1)
        except ValueError:
            require(Path(str(self.val)).is_file(), "val", "a share in 0..1 or a list's file", self.val)
            return None
        require(0 <= share < 1, "val", "a share of 0 to below 1, or a list's file", self.val)
        return share


@dataclass
class Prepared:
    """What became of a pile of photographs.

    Attributes:
        classes: names without the background -> number of photographs of each, to train on and to validate on.
        train, val: number of photographs of each list.
        added: photographs written now.
        refused: a line for each file that was not taken.
    """

    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    train: int = 0
    val: int = 0
    added: int = 0
    refused: list[str] = field(default_factory=list)


def prepare_folder(source: str | Path, root: str | Path, settings: FolderSettings | None = None) -> Prepared:
    """Make of the photographs in ``source`` a data set in ``root``, or add them to the one that is there.

    Given again it goes on where it stopped; photographs that are there keep their names, their classes' numbers and
    their side of the split.

    Raises:
        ConfigError: ``root`` holds something else or was prepared otherwise, or a setting makes no sense.
        DataError: no photographs, or none that can be taken; a label file or a list that cannot be read.
    """
    settings = settings or FolderSettings()
    source, root = Path(source).expanduser(), Path(root).expanduser()
    if not source.is_dir():
        raise DataError(f"source: {source} is not a folder")
    if root.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"root: {root} holds the photographs themselves; choose another folder")
    before = read_record(root)
    record = before or Record()
    writable_folder(root, "root")
    left_out = [root, *([Path(settings.masks)] if settings.masks else [])]
    sources, refused = photographs_in(source, left_out)
    if not sources:
        raise DataError(f"source: no photograph in {source} or below it", refused)
    _agree_with(record, settings, root)
    if settings.val is None:
        settings = replace(settings, val=record.settings.get("val"))
    said = labels_of(sources, source, settings.labels, settings.masks, settings.classes)
    refused += said.problems
    record.classes = _classes(record, said, settings, root)
    kept = _kept(said, record, settings, refused)
    if not kept and not record.photographs:
        raise DataError("source: no photograph can be taken", refused)
    lines = class_lines(record.classes)  # what is wrong with a name is told before the work
    _place(record, said, kept, source, root)
    listed = None
    if settings.share() is None:  # what is wrong with a list is told before the work
        listed = _listed(Path(str(settings.val)), record, source, sources)
    elif any(record.settings.get(name) != getattr(settings, name) for name in ("val", "seed")):
        for item in record.photographs.values():  # another split
            item.val = None
    record.settings |= {"val": settings.val, "seed": settings.seed}
    record.write(root)  # before the photographs: a run that is stopped leaves what it had planned
    added = _copy(record, source, root, settings, refused)
    _split(record, settings, listed, sources)  # of what could be read: else a class's share may be what could not
    write_lines(root / "classes.txt", lines)
    return _written(record, root, added, refused)


def _classes(record: Record, said: Said, settings: FolderSettings, root: Path) -> list[str]:
    """The classes by number. Those that are there keep theirs, for a trained model knows them by it."""
    known = record.classes
    if settings.classes is not None:
        given = given_classes(settings.classes)
        if given[: len(known)] != known:
            raise ConfigError(
                f"classes: {root} has {', '.join(known)}, by whose numbers trained models know them; new ones go behind"
                " these (or choose another root)"
            )
        record.settings["chosen"] = True
        return given
    if record.settings.get("chosen"):
        return known
    added = [name for name in said.classes() if name not in known]
    if known and added:
        notice(f"added {root}", f"new classes, numbered behind those there are: {', '.join(added)}")
    return [*known, *added]


def _kept(said: Said, record: Record, settings: FolderSettings, refused: list[str]) -> dict[Source, list[str]]:
    """The photographs to take, with those of their labels that are classes."""
    kept, number = {}, {name: place for place, name in enumerate(record.classes)}
    there = {item.source for item in record.photographs.values()}
    for item, why in said.unlabelled.items():
        if str(item.path.absolute()) not in there:  # else it was labelled before
            refused.append(f"{item.inside}: {why}")
    for item, own in said.labels.items():
        found = sorted((label for label in own if label in number), key=number.__getitem__)
        if found or settings.allow_empty:
            kept[item] = found
        else:
            why = f"{', '.join(own)} not among the classes" if own else "it shows no class (taken with --allow_empty)"
            refused.append(f"{item.inside}: {why}")
    return kept


# --- which photographs ------------------------------------------------------------------------------------------------


def _agree_with(record: Record, settings: FolderSettings, root: Path) -> None:
    """Take what was not said from the run before, and refuse to mix photographs of different sizes."""
    said = {"long_side": settings.long_side}
    for name, value in said.items():
        there = record.settings.get(name)
        if record.photographs and there != value:
            raise ConfigError(f"{name}: {root} was prepared with {there}, now {value}; choose another root")
    record.settings |= said


def _place(record: Record, said: Said, kept: Mapping[Source, list[str]], source: Path, root: Path) -> None:
    """Give each photograph its name in the record.

    Files of the same name and the same contents are one photograph, with the labels of all; of the same name and other
    contents they are several.
    """
    photographs = record.photographs
    dropped = {str(item.path.absolute()) for item in said.labels if item not in kept}
    for name in [name for name, item in photographs.items() if item.source in dropped]:
        del photographs[name]
        _image(root, name).unlink(missing_ok=True)
    of_path = {item.source: name for name, item in photographs.items()}
    of_contents = {(Path(item.source).name, item.sha256): name for name, item in photographs.items()}
    taken = {name.casefold() for name in photographs}

    def contents(item: Source) -> str:
        known = photographs.get(of_path.get(str(item.path.absolute()), ""))
        same = known is not None and (known.size, known.changed) == (item.size, item.changed)
        return known.sha256 if same else digest(item.path)

    fresh: set[str] = set()
    for item, sha256 in zip(kept, in_threads(contents, list(kept), "comparing")):
        path, own = str(item.path.absolute()), kept[item]
        name = of_contents.get((item.path.name, sha256)) or of_path.get(path)
        if name in fresh and photographs[name].sha256 == sha256:
            there = photographs[name]
            there.labels = sorted({*there.labels, *own}, key=record.classes.index)
            continue
        if name is None or name in fresh:  # fresh: what this file was one with before is another photograph now
            name = free_name(item.inside, taken)
            taken.add(name.casefold())
        there = photographs.get(name)
        if there is not None and there.sha256 != sha256:  # the file was changed since
            _image(root, name).unlink(missing_ok=True)
        elsewhere = there is not None and there.sha256 == sha256 and _of_another_pile(there.source, source)
        if elsewhere:  # two piles have it, and what the other one says holds, too
            own = sorted({*there.labels, *own}, key=record.classes.index)
        val = there.val if there is not None else None
        photographs[name] = Photograph(path, item.size, item.changed, sha256, list(own), val)
        of_contents[item.path.name, sha256] = name
        fresh.add(name)


def _of_another_pile(file: str, source: Path) -> bool:
    """Whether a file that is there is none of the folder ``source``; one that is gone was moved."""
    return not Path(file).is_relative_to(source.absolute()) and Path(file).is_file()


def _image(root: Path, name: str) -> Path:
    return root / "JPEGImages" / f"{name}.jpg"


def _split(record: Record, settings: FolderSettings, listed: set[str] | None, sources: Sequence[Source]) -> None:
    photographs = record.photographs
    if listed is not None:
        here = {str(item.path.absolute()) for item in sources}
        for name, item in photographs.items():
            item.val = name in listed or (item.source not in here and bool(item.val))
        return
    placed = {name: item.val for name, item in photographs.items() if item.val is not None}
    labels = {name: item.labels for name, item in photographs.items()}
    chosen = validation_share(labels, settings.share(), settings.seed, placed)
    for name, item in photographs.items():
        item.val = name in chosen


def _listed(path: Path, record: Record, source: Path, sources: Sequence[Source]) -> set[str]:
    """The photographs that a list names, by their files in the source, or by their names here."""
    names, chosen, problems = Names(sources), set(), []
    of_path = {item.source: name for name, item in record.photographs.items()}
    of_contents = {(Path(item.source).name, item.sha256): name for name, item in record.photographs.items()}
    for number, text in lines_of(path):
        meant = names.of(text)
        found = [of_path.get(str(item.path.absolute())) or of_contents.get((item.path.name, digest(item.path)))
                 for item in meant]  # fmt: skip
        if not meant and text in record.photographs:
            chosen.add(text)
        elif meant and len(set(found)) == 1:
            chosen |= set(found) - {None}  # None: it was refused
        else:
            which = ", ".join(str(item.inside) for item in meant[:3])
            problems.append(f"line {number}: {text!r}: " + (f"may mean {which}" if meant else "no such photograph"))
    if problems:
        raise DataError(f"val: {path}: lines name no photograph in {source}", problems)
    return chosen


def _copy(record: Record, source: Path, root: Path, settings: FolderSettings, refused: list[str]) -> int:
    """Write the photographs that are not there; those that cannot be read leave the record. How many were written."""

    def copied(name: str) -> str | int:
        item = record.photographs[name]
        try:
            return copy_photograph(Path(item.source), _image(root, name), settings.long_side, settings.max_pixels)
        except AfaError as error:
            phone = Path(item.source).suffix.lower() in (".heic", ".heif")
            return f"{error}" + "; to read it: pip install pillow-heif" * phone

    names = [name for name in sorted(record.photographs) if not _image(root, name).is_file()]
    try:
        outcomes = in_threads(copied, names, "photographs")
    except OSError as error:
        raise DataError(f"root: {root} cannot be written ({reason(error)})") from error
    for name, outcome in zip(names, outcomes):
        if isinstance(outcome, str):
            refused.append(outcome.removeprefix(f"{source.absolute()}{os.sep}"))
            del record.photographs[name]
    written = sorted(outcome for outcome in outcomes if isinstance(outcome, int))
    if settings.long_side is None and written and written[len(written) // 2] > _LARGE:
        notice(
            f"large {root}",
            f"half of the photographs have a side of {written[len(written) // 2]} pixels or more, of which a training"
            " crop sees little: --long_side 640 shrinks them, into another root",
        )
    return len(written)


def _written(record: Record, root: Path, added: int, refused: list[str]) -> Prepared:
    """Write lists and labels of the photographs that are there."""
    photographs = record.photographs
    if refused:
        write_lines(root / REFUSED, refused)
    else:
        (root / REFUSED).unlink(missing_ok=True)
    train = [name for name in sorted(photographs) if not photographs[name].val]
    val = [name for name in sorted(photographs) if photographs[name].val]
    if not train:
        raise DataError("source: no photograph to train on" if val else "source: no photograph can be taken", refused)
    write_labels(root, {name: photographs[name].labels for name in sorted(photographs)})
    write_lines(root / _LISTS / f"{TRAIN}.txt", train)
    if val:
        write_lines(root / _LISTS / f"{VAL}.txt", val)
    else:
        (root / _LISTS / f"{VAL}.txt").unlink(missing_ok=True)
    record.write(root)
    counts = [Counter(label for name in names for label in photographs[name].labels) for names in (train, val)]
    classes = {name: (counts[0][name], counts[1][name]) for name in record.classes}
    missing = [name for name, (to_train, _) in classes.items() if not to_train]
    if missing:
        notice(f"missing {root}", f"no photograph to train on shows {', '.join(missing)}")
    return Prepared(classes, len(train), len(val), added, refused)
