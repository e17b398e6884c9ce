"""The look at every file of a data set before training: what is missing or broken, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from ..conventions import IGNORE
from ..runtime.progress import in_threads
from .files import find_image, outside_classes, values_in

CheckLevel = Literal["full", "headers", "off"]


@dataclass
class FileReport:
    """What was found for one image.

    Args:
        problems: lines such as ``JPEGImages/x.jpg: not found``.
        classes: values other than 255 in its mask, or None if the mask was not decoded.
    """

    problems: list[str] = field(default_factory=list)
    classes: list[int] | None = None


def check_files(
    root: str | Path,
    names: Sequence[str],
    *,
    image_dir: str,
    mask_dir: str | None,
    num_classes: int,
    level: CheckLevel = "full",
    title: str = "checking files",
) -> list[FileReport]:
    """Look at the photograph and, if ``mask_dir`` is given, the mask of every name; one report per name.

    ``full`` decodes every file (photographs at an eighth of their size, which is several times faster and
    still reads every byte); ``headers`` opens them and compares sizes without decoding; ``off`` opens
    nothing.
    """

    def look(name: str) -> FileReport:
        report = FileReport()
        if level == "off":
            return report
        size = _check_photo(Path(root), image_dir, name, level, report)
        if mask_dir is not None:
            _check_mask(Path(root), mask_dir, name, size, num_classes, level, report)
        return report

    return in_threads(look, names, title)


def _check_photo(
    root: Path, image_dir: str, name: str, level: str, report: FileReport
) -> tuple[int, int] | None:
    path = find_image(root / image_dir, name)
    if path is None:
        report.problems.append(f"{image_dir}/{name}.jpg: not found")
        return None
    try:
        with Image.open(path) as image:
            size = image.size
            if level == "full":
                if image.mode in ("RGB", "L"):
                    image.draft(image.mode, (size[0] // 8, size[1] // 8))
                image.load()
        return size
    except Exception as error:  # decoders raise whatever they like on broken bytes
        report.problems.append(f"{path.relative_to(root)}: cannot be decoded ({_short(error)})")
        return None


def _check_mask(
    root: Path,
    mask_dir: str,
    name: str,
    size: tuple[int, int] | None,
    num_classes: int,
    level: str,
    report: FileReport,
) -> None:
    path = root / mask_dir / f"{name}.png"
    where = f"{mask_dir}/{name}.png"
    if not path.is_file():
        report.problems.append(f"{where}: not found")
        return
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                report.problems.append(
                    f"{where}: image mode {image.mode}; class indices (mode P or L) are needed"
                )
                return
            if size is not None and image.size != size:
                report.problems.append(
                    f"{where}: {image.size[0]}x{image.size[1]} pixels, its photograph has {size[0]}x{size[1]}"
                )
            if level == "full":
                report.classes = [value for value in values_in(image) if value != IGNORE]
    except Exception as error:
        report.problems.append(f"{where}: cannot be decoded ({_short(error)})")
        return
    wrong = outside_classes(report.classes or [], num_classes)
    if wrong:
        report.problems.append(f"{where}: {wrong}")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
