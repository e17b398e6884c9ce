"""Files of tensors (of ``torch.save``, safetensors): read without running code from them, saying what is wrong, and
written whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AfaError, CheckpointError, SavingError, naming, reason
from .writing import whole

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Whoever calls ``torch.load`` inside reads tensors only, whatever it asks for: a library that downloads weights
    may ask for all that a pickle can do.
    """
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCED)
        if before is not None:
            os.environ[_FORCED] = before


def read_tensors(
    path: str | os.PathLike,
    what: str = "checkpoint",
    kind: type[AfaError] = CheckpointError,
    device: str | torch.device = "cpu",
) -> Any:
    """What a file of tensors holds: plain data and tensors, those on ``device``.

    Raises:
        kind: ``WHAT PATH ...`` and why: it is not there, cut, damaged (every checksum is looked at), a web page,
            something else altogether, or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise kind(f"{what} {path}: " + ("a folder, not a file" if path.is_dir() else "no such file"))
    damaged = "is damaged or not a checkpoint" if what == "checkpoint" else "is damaged or holds no weights"
    with naming(path, what, kind, is_not=damaged):
        with path.open("rb") as file:
            start = file.read(512)
        other = _something_else(start)
        if other:
            raise kind(f"{what} {path} {damaged}: {other}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # what timm depends on

            return load_file(path, str(device))
        if not start.startswith((_ZIP, _PICKLE)):
            raise kind(f"{what} {path} {damaged}: it starts with {start[:16]!r}, as no file of torch.save does")
        wrong = start.startswith(_ZIP) and _wrong_archive(path)
        if wrong:
            raise kind(f"{what} {path} {damaged}: {wrong}")
        try:
            # What timm's own training leaves beside the weights; it has no behaviour.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # broken bytes make the unpickler raise whatever they lead it to
            raise kind(f"{what} {path} {damaged}: {told(error)}{_hint(error)}") from error


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Tensors by name as safetensors, where the file's ending says so, else as of ``torch.save``; on the CPU, none of
    them a part of another's memory. The file is whole or as it was.

    Raises:
        SavingError: with the path and the system's reason.
    """
    path = Path(path)
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        with whole(path) as temporary:
            if path.suffix == ".safetensors":
                from safetensors.torch import save_file

                save_file(plain, temporary, metadata={"format": "pt"})
            else:
                torch.save(plain, temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        raise SavingError(f"could not write {path}: {reason(error)}") from error
    return path


def _something_else(start: bytes) -> str | None:
    """What a file is that is often found in place of weights."""
    text = start.lstrip().lower()
    if not start:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page (the download brought a page in place of the file)"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file (`git lfs pull` fetches it)"
    return None


def _wrong_archive(path: Path) -> str | None:
    """What is wrong with a zip file, every byte of which is compared with its checksum."""
    if not zipfile.is_zipfile(path):
        return f"it is cut short: the end of the archive is missing ({path.stat().st_size} bytes are there)"
    with zipfile.ZipFile(path) as archive:
        try:
            broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            return f"its archive is broken: {reason(error)}"
        if broken is not None:
            return f"the bytes of {broken} are not those that were written (checksum)"
        names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        return "it is an archive without data.pkl, which torch.save would have written"
    if any("/code/" in name for name in names):
        return "it is a TorchScript program, not weights"
    return None


def told(error: Exception) -> str:
    """What ``torch.load`` found in a pickle that holds more than data or is broken, without its advice to run it."""
    named = _named(error)
    if named:
        return f"it holds more than data ({named}), which is not run"
    if str(error).startswith("Weights only load failed"):
        found = re.search(r"Unpickl\w*Error:?\s*([^\n]+)|(Unsupported [^\n]+)", str(error))
        what = next(filter(None, found.groups())) if found else "something"
        return f"the pickle in it is broken ({what}, which torch.save does not write)"
    return f"the pickle in it is broken ({reason(error)})"


def _hint(error: Exception) -> str:
    return " (of a whole model save model.state_dict() with torch.save)" if _named(error) else ""


def _named(error: Exception) -> str | None:
    """The function or class that a pickle asks for."""
    named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+) that|function ([\w.]+) ", str(error))
    return next(filter(None, named.groups())) if named and "nsupported" in str(error) else None
