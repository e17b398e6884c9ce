"""The photographs of a source folder: which they are, which are the same, what they are called, how they are copied."""

from __future__ import annotations

import contextlib
import re
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from ...runtime.writing import whole
from ..files import files_below, made_here
from ..label_file import same_folders
from ..photographs import IMAGE_SUFFIXES, opened, orientation, read_photograph

_LONGEST = 200  # bytes of a name; file systems take 255, with ending and number
QUALITY = 95  # of the JPEG files that are made

# What lies beside photographs and is none: not worth a line
_BESIDE = (".json", ".xml", ".csv", ".tsv", ".txt", ".md", ".yaml", ".yml", ".ini", ".db", ".aae", ".xmp", ".thm")


@dataclass(frozen=True)
class Source:
    """A file that may be a photograph.

    Attributes:
        path: the file.
        inside: its path in the source folder.
        size, changed: its length in bytes, and when it was changed last (ns).
    """

    path: Path
    inside: PurePosixPath
    size: int
    changed: int

    @property
    def folder(self) -> str:
        """The sub-folder of the source folder that it lies in, at whatever depth; nothing if in none."""
        return self.inside.parts[0] if len(self.inside.parts) > 1 else ""


def photographs_in(folder: Path, without: Iterable[Path]) -> tuple[list[Source], list[str]]:
    """The photographs in a folder and below, sorted, but for hidden ones and those in the folders ``without``; and a
    line for each other file that is none.
    """
    _read_heic()
    suffixes = {*IMAGE_SUFFIXES, *Image.registered_extensions()}
    found, refused = [], []
    for here, names in files_below(folder, tuple(without)):
        for name in names:
            path = Path(here, name)
            suffix = path.suffix.lower()
            if name.startswith(".") or suffix in _BESIDE or name.lower() in ("thumbs.db", "desktop.ini"):
                continue
            inside = PurePosixPath(path.relative_to(folder).as_posix())
            if path.is_symlink() and not path.exists():
                refused.append(f"{inside}: a link to what is not there")
            elif suffix not in suffixes or not path.is_file():
                refused.append(f"{inside}: no photograph by its ending")
            elif suffix == ".png" and made_here(path):
                refused.append(f"{inside}: a label or a panel that afa made, no photograph")
            else:
                stat = path.stat()
                found.append(Source(path, inside, stat.st_size, stat.st_mtime_ns))
    return found, refused


def _read_heic() -> None:
    """The format of phones, which Pillow reads by a package of its own."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def free_name(inside: PurePosixPath, taken: Collection[str]) -> str:
    """What a photograph is called: its path without its ending, in letters, digits, ``_ - + ( )`` and ``/`` alone, so
    that every list and every program can name it. Where that is taken, with a number behind it.

    ``taken`` has names in lower case, which some file systems do not tell from upper case.
    """
    parts = [*inside.parent.parts, inside.stem]
    plain = (re.sub(r"[^\w()+-]+", "_", unicodedata.normalize("NFC", part)) for part in parts)
    bare = "/".join(part.encode()[:_LONGEST].decode(errors="ignore") for part in plain)
    name, number = bare, 1
    while name.casefold() in taken:
        number += 1
        name = f"{bare}_{number}"
    return name


def copy_photograph(source: Path, target: Path, long_side: int | None, max_pixels: int | None) -> int:
    """Write a photograph as JPEG: the file itself if it is an upright RGB or grey JPEG and small enough, else what
    :func:`~afa_model.data.photographs.read_photograph` makes of it (EXIF applied, transparency on white, 8 bits).
    Returns the pixels of its longer side.

    Args:
        long_side: pixels that the longer side has at most; None: as many as it has.

    Raises:
        PhotographError: it cannot be read; OSError: the target cannot be written.
    """
    with opened(source, max_pixels) as image:
        small = long_side is None or max(image.size) <= long_side
        fine = small and image.format == "JPEG" and image.mode in ("RGB", "L") and orientation(image) == 1
    pixels = read_photograph(source, max_pixels=max_pixels)  # also of one that is copied: what is wrong shows now
    with whole(target) as path:
        if fine:
            shutil.copyfile(source, path)
            return max(pixels.shape)
        made = Image.fromarray(pixels)
        if not small:
            share = long_side / max(made.size)
            size = [max(1, round(side * share)) for side in made.size]
            made = made.resize(size, Image.Resampling.LANCZOS)
        made.save(path, "JPEG", quality=QUALITY, subsampling=0)
        return max(made.size)


class Names:
    """Finds photographs by what label files and lists call them: a path, with or without ending, or the name alone."""

    def __init__(self, sources: Iterable[Source]):
        self._by_key: dict[str, list[Source]] = defaultdict(list)
        for source in sources:
            inside = source.inside
            for key in {str(inside), str(inside.with_suffix("")), inside.name, inside.stem}:
                self._by_key[_plain(key)].append(source)

    def of(self, said: str) -> list[Source]:
        """Those that it may mean; more than one if it does not say which."""
        path = PurePosixPath(_plain(re.sub(r"^(\./)+", "", said.strip().replace("\\", "/"))))
        bare = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES and path.stem else path
        for key in (path, bare, path.name, bare.name):
            known = self._by_key.get(str(key), ())
            found = [source for source in known if same_folders(str(path), _plain(str(source.inside)))]
            if found:
                exact = [source for source in found if _plain(str(source.inside)) == str(path)]
                return exact or found
        return []


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)
