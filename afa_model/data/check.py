"""The look at every file of a data set before training: what is missing or broken, all of it at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ..conventions import IGNORE
from ..errors import AfaError
from ..runtime.notices import notice
from ..runtime.progress import in_threads
from .lists import find_file
from .masks import Mask, MaskRules, read_mask
from .photographs import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Exif,
    PhotographError,
    opened,
    orientation,
    read_photograph,
    sizes,
)

CheckLevel = Literal["full", "headers", "off"]


class Files(NamedTuple):
    """What belongs to one image.

    photo    the photograph, or None if it is not there
    missing  what to say then
    mask     the mask, whether it is there or not; None where none is needed
    """

    photo: Path | None
    missing: str
    mask: Path | None


@dataclass
class FileReport:
    """What was found for one image.

    Attributes:
        problems: lines such as ``JPEGImages/x.jpg: not found``.
        classes: values other than 255 in its mask, or None if the mask was not decoded.
        turn: EXIF's orientation of the photograph where its mask has none, 1..8.
        kind: how the mask was read; see :class:`~afa_model.data.masks.Mask`.
        stored: the values in the mask's file.
        colours: of a palette that is not VOC's.
    """

    problems: list[str] = field(default_factory=list)
    classes: list[int] | None = None
    turn: int = 1
    kind: str = ""
    stored: tuple[int, ...] = ()
    colours: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def decoded(self, mask: Mask) -> None:
        """Note what a mask holds."""
        present = np.flatnonzero(np.bincount(mask.classes.ravel(), minlength=256)).tolist()
        self.classes = [value for value in present if value != IGNORE]
        self.kind, self.stored, self.colours = mask.kind, mask.stored, dict(mask.colours)
        self.turn = self.turn if mask.turn == 1 else 1


def check_files(
    root: str | Path,
    files: Sequence[Files],
    *,
    rules: MaskRules,
    exif: Exif = "apply",
    max_pixels: int | None = MAX_PIXELS,
    level: CheckLevel = "full",
    title: str = "checking files",
) -> list[FileReport]:
    """Look at the photograph and, if there is one, the mask of every image; one report each.

    ``full`` decodes every file (photographs at an eighth of their size, which is several times faster and
    still reads every byte); ``headers`` opens them and compares sizes without decoding; ``off`` opens
    nothing.
    """

    def look(item: Files) -> FileReport:
        report = FileReport()
        if level == "off":
            return report
        both = _check_photo(item, exif, max_pixels, level, report)
        if item.mask is not None and item.photo is not None:
            _check_mask(item.mask, both, exif, rules, level, report)
        report.problems = [shown(line, root) for line in report.problems]
        return report

    return in_threads(look, files, title)


def shown(text: str, root: str | Path) -> str:
    """A path, or a line that begins with one, from the data set's root on if it lies there."""
    return text.removeprefix(f"{root}{os.sep}")


def _check_photo(
    item: Files, exif: Exif, max_pixels: int | None, level: str, report: FileReport
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(width, height) as it will be read, and the other way; None if it cannot be read."""
    if item.photo is None:
        report.problems.append(item.missing)
        return None
    try:
        with opened(item.photo, max_pixels) as image:
            stored, upright = sizes(image)
            report.turn = orientation(image)
            if level == "full":
                _decode(image, item.photo, max_pixels)
        return (upright, stored) if exif == "apply" else (stored, upright)
    except PhotographError as error:
        report.problems.append(str(error))
        return None


def _decode(image: Image.Image, path: Path, max_pixels: int | None) -> None:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    elif image.mode in ("RGB", "L", "P", "1") and image.format != "PNG" and image.format != "TIFF":
        image.load()
    else:  # more than decoding can go wrong
        read_photograph(path, max_pixels=max_pixels)


def _check_mask(
    path: Path,
    both: tuple[tuple[int, int], tuple[int, int]] | None,
    exif: Exif,
    rules: MaskRules,
    level: str,
    report: FileReport,
) -> None:
    if not path.is_file():
        other = find_file(path.parent, path.stem, IMAGE_SUFFIXES)
        said = f" ({other.name} is there: JPEG and others do not keep classes exactly)" if other else ""
        report.problems.append(f"{path}: not found{said}")
        return
    try:
        if level == "full":
            mask = read_mask(path, rules, exif)
            report.decoded(mask)
            size = mask.classes.shape[::-1]
        else:
            with opened(path) as image:
                stored, upright = sizes(image)
                size = upright if exif == "apply" else stored
    except PhotographError as error:
        report.problems.append(str(error))
        return
    except ValueError as error:
        report.problems.append(f"{path}: {error}")
        return
    if both is None or size == both[0]:
        return
    text = f"{path}: {size[0]}x{size[1]} pixels, its photograph has {both[0][0]}x{both[0][1]}"
    if size == both[1]:
        how, other = ("turned as", "ignore") if exif == "apply" else ("not turned as", "apply")
        text += f" {how} its EXIF says (orientation {report.turn}); data.exif: {other} would fit"
    report.problems.append(text)


# What only the whole data set shows.


def check_together(
    root: str | Path, files: Sequence[Files], reports: Sequence[FileReport], rules: MaskRules, exif: Exif
) -> None:
    """Add to the reports, or say in a line, what one file alone does not show.

    Photographs that EXIF turns beside masks that it does not; masks read by colour; masks of 0 and 255 alone;
    palettes of which one colour stands for several values; palettes that fit colours here and values there.
    """
    masks = [
        (shown(str(item.mask), root), report)
        for item, report in zip(files, reports)
        if item.mask is not None and not report.problems
    ]
    _tell_turned(masks, exif)
    _tell_colours(masks)
    if IGNORE not in rules.mask_values:
        _find_all_or_nothing(masks)
    if rules.by_colour:
        _find_both_ways(masks)
        _find_other_palettes(masks)


def _tell_turned(masks: Sequence[tuple[str, FileReport]], exif: Exif) -> None:
    turned = [path for path, report in masks if report.turn != 1]
    if turned:
        taken, other = ("upright", "ignore") if exif == "apply" else ("as the pixels are stored", "apply")
        notice(
            f"turned {exif} {turned}",
            f"EXIF turns {len(turned)} of {len(masks)} photographs whose masks it does not turn (mask {turned[0]}):"
            f" masks are taken to be {taken}; if they are not, set data.exif: {other}",
        )


def _tell_colours(masks: Sequence[tuple[str, FileReport]]) -> None:
    for kind, what in (
        ("moved palette", "have a palette in another order: read by colour (data.mask_palette: index reads values)"),
        ("colours", "hold colours: read as VOC's"),
    ):
        found = [path for path, report in masks if report.kind == kind]
        if found:
            notice(f"{kind} {found}", f"{len(found)} of {len(masks)} masks {what}: {found[0]}")


def _find_all_or_nothing(masks: Sequence[tuple[str, FileReport]]) -> None:
    """Grey masks of 0 and 255 alone: an object in white, or nothing but ignored pixels?"""
    grey = [
        (path, report)
        for path, report in masks
        if report.stored and (report.kind == "indices" or (report.kind == "palette" and report.colours))
    ]
    suspects = [(path, report) for path, report in grey if report.stored in ((0, IGNORE), (IGNORE,))]
    # Where other grey masks hold classes, 255 is as usual.
    if not suspects or any(set(report.classes or ()) - {0} for _, report in grey):
        return
    for path, report in suspects:
        report.problems.append(
            f"{path}: holds 0 and 255 alone, and 255 is ignored; which class is 255? data.mask_values: {{255: 1}}"
            " makes it class 1, {255: 255} says that it is ignored"
        )


def _find_both_ways(masks: Sequence[tuple[str, FileReport]]) -> None:
    """A palette that seems to be VOC's or grey levels, by the few colours that one mask uses, in a set where others say
    that it is neither: what is right for all cannot be told.
    """
    moved = [path for path, report in masks if report.kind == "moved palette"]
    for path, report in masks if moved else ():
        if report.kind == "palette" and report.colours:
            value, colour = max(report.colours.items())
            report.problems.append(
                f"{path}: the colour {colour} of value {value} is no class's, while those of {moved[0]} are classes' in"
                " another order: are masks to be read by value or by colour? data.mask_palette: index takes the values"
            )


def _find_other_palettes(masks: Sequence[tuple[str, FileReport]]) -> None:
    owners: dict[tuple[int, ...], tuple[int, str]] = {}
    for path, report in masks:
        several = list(report.colours.values())
        for value, colour in report.colours.items():
            if several.count(colour) > 1:
                continue
            first, other = owners.setdefault(colour, (value, path))
            if first != value:
                report.problems.append(
                    f"{path}: colour {colour} is value {value} here and {first} in {other}: the palettes differ, so"
                    " values are no classes; save the masks with one palette (data.mask_palette: index reads values)"
                )
                break


def refuse_shared(names: Sequence[str], owned: Sequence[object], reports: Sequence[FileReport], what: str) -> None:
    """Add to the reports where two images were given one thing (None is none), such as a mask: of two files of one
    name in different folders one would get what belongs to the other.
    """
    first: dict[object, str] = {}
    for name, thing, report in zip(names, owned, reports):
        if thing is not None and first.setdefault(thing, name) != name:
            report.problems.append(f"{name}: {what} {thing} is that of {first[thing]} too; each image needs its own")


def refuse_own_mask(files: Sequence[Files], reports: Sequence[FileReport], root: str | Path) -> None:
    """Add to the reports where the mask of a photograph is the photograph."""
    for item, report in zip(files, reports):
        if item.photo is None or item.mask is None or item.mask.stem != item.photo.stem or not item.mask.is_file():
            continue
        if os.path.samefile(item.mask, item.photo):
            report.problems.append(f"{shown(str(item.photo), root)}: photograph and mask are the same file")


def named(error: AfaError | OSError | ValueError, path: str | Path) -> str:
    """The message of an error, beginning with the file's name."""
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"
