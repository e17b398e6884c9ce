"""Archives of published data sets: downloaded where there is a network, or laid there by hand; checked and unpacked."""

from __future__ import annotations

import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from torchvision.datasets.utils import calculate_md5

from ...errors import DataError, naming, reason
from ...runtime.progress import progress
from ...runtime.writing import whole, writable_folder

FOLDER = "downloads"  # in the data set's root
_BLOCK = 1 << 20
_TRIES = 5  # that bring nothing new, before a download is given up
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A file of a published data set.

    Attributes:
        name: of the file.
        url: where it is to be had.
        md5: of its contents.
        size: in words, for people.
    """

    name: str
    url: str
    md5: str
    size: str = ""


def obtain(archives: Sequence[Archive], root: Path, offline: bool) -> list[Path]:
    """The archives, each where it lies: in ``<root>/downloads``, in the root or beside it; downloaded if need be.

    Raises:
        DataError: with a line for each that is missing or damaged: where it is to be had, and where to put it.
    """
    found, problems = [], []
    for archive in archives:
        try:
            found.append(_obtain(archive, root, offline))
        except DataError as error:
            problems.append(str(error))
    if problems:
        many = f"{len(problems)} of {len(archives)} archives are" if len(archives) > 1 else "an archive is"
        raise DataError(f"root {root}: {many} missing; lay there what is listed and give the line again", problems)
    return found


def _obtain(archive: Archive, root: Path, offline: bool) -> Path:
    target = root / FOLDER / archive.name
    size = f" ({archive.size})" if archive.size else ""
    there = f"get it from {archive.url}{size} and put it at {target}"
    for path in (target, root / archive.name, root.absolute().parent / archive.name):
        if path.is_file():
            md5 = calculate_md5(path)
            if md5 != archive.md5:
                raise DataError(f"{path}: damaged or cut off: its MD5 is {md5}, not {archive.md5}; {there}")
            return path
    if offline:
        raise DataError(f"{target}: not found; {there}")
    writable_folder(target.parent, "root")
    try:
        _download(archive, target)
    except (OSError, http.client.HTTPException) as error:
        part = _part(target)
        kept = f" ({part.stat().st_size} bytes of it are kept in {part.name})" if part.exists() else ""
        raise DataError(f"{target}: cannot be downloaded: {_why(error)}{kept}; {there}") from error
    return target


def _why(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        return error.reason.strerror or str(error.reason)
    return reason(error)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _download(archive: Archive, target: Path) -> None:
    """Into ``NAME.part``, from where an earlier try ended; ``NAME`` appears when its checksum is right."""
    part, left = _part(target), _TRIES
    while True:
        before = part.stat().st_size if part.exists() else 0
        error: Exception | None = None
        try:
            complete = _append(archive, part, before)
        except urllib.error.HTTPError:
            raise  # the server's word is no accident of the line
        except (OSError, http.client.HTTPException) as problem:
            complete, error = False, problem
        if complete:
            break
        left = _TRIES if part.exists() and part.stat().st_size > before else left - 1
        if left == 0:
            raise error or ConnectionError("the connection ends before the file does")
    md5 = calculate_md5(part)
    if md5 != archive.md5:
        part.unlink()
        raise OSError(f"what was downloaded has the MD5 {md5}, not {archive.md5}")
    part.replace(target)


def _append(archive: Archive, part: Path, start: int) -> bool:
    """Whether the file is whole now."""
    wanted = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(archive.url, headers={"User-Agent": "afa", **wanted})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies behind what is there
            return True
        raise
    with response:
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        blocks = iter(lambda: response.read(_BLOCK), b"")
        with part.open("ab" if start else "wb") as file:
            title = f"{archive.name} (MiB)"
            for block in progress(blocks, title, None if total is None else (total - start) // _BLOCK + 1):
                file.write(block)
    return total is None or part.stat().st_size >= total


def unpack(path: Path, root: Path, places: Mapping[str, str]) -> None:
    """Unpack what lies at one of the ``places`` in an archive (.tar, .tgz or .zip) to its place in the root.

    A file that is there in the right size is left; each appears when it is whole.

    Args:
        places: folder or file in the archive -> folder or file in the root.

    Raises:
        DataError: the archive is damaged, or the root cannot be written.
    """
    with naming(path, "archive", is_not="cannot be unpacked"):
        for name, size, content in progress(_members(path), f"unpacking {path.name}"):
            target = _target(name, root, places)
            if target is None or (target.is_file() and target.stat().st_size == size):
                continue
            with content() as source, whole(target) as temporary, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, _BLOCK)


def _members(path: Path) -> Iterator[tuple[str, int, object]]:
    """(name, size, function that opens it) of each file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if not item.is_dir():
                    yield item.filename, item.file_size, lambda item=item: archive.open(item)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, member.size, lambda member=member: _opened(archive, member)


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None
    return content


def _target(name: str, root: Path, places: Mapping[str, str]) -> Path | None:
    parts = PurePosixPath(re.sub(r"^(\./)+", "", name))
    for place, target in places.items():
        if parts == PurePosixPath(place):
            return root / target
        if parts.is_relative_to(place):
            rest = parts.relative_to(place)
            if ".." in rest.parts:
                raise ValueError(f"{name!r} would lie outside the root")
            return root / target / rest
    return None
