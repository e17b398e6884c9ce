"""Files that are not what they should be: with code in them, cut, damaged, something else."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

WEB_PAGE = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"


class Payload:
    """Unpickled, it makes the folder ``mark``."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def write_payload(path: Path, mark: Path, **beside: Any) -> Path:
    """A file in the format of its suffix, that makes the folder ``mark`` when it is read carelessly."""
    content = {**beside, "2007_000001": Payload(mark)}
    if path.suffix == ".npy":
        np.save(path, np.array(content, dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, labels=np.array(content, dtype=object))
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix != ".bin")
    return path


def flip_bytes(path: Path, count: int = 100) -> str:
    """Turn ``count`` bytes in the middle of the largest part of a zip file -> that part's name."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray(path.read_bytes())
    middle = part.header_offset + 200 + part.file_size // 2
    content[middle : middle + count] = bytes(255 - byte for byte in content[middle : middle + count])
    path.write_bytes(content)
    return part.filename


def write_something_else(path: Path, kind: str) -> None:
    """What is found in place of weights."""
    if kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "cut":
        torch.save({"weight": torch.ones(5000)}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "cut pickle":
        torch.save({"weight": torch.ones(5000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "flipped":
        torch.save({"weight": torch.ones(5000)}, path)
        flip_bytes(path)
    else:
        content = {"empty": b"", "page": WEB_PAGE, "text": b"hello " * 100, "letters": b"\x80\x02}q\x00(X\x01e" * 40}
        content["pointer"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        path.write_bytes(content[kind])


SOMETHING_ELSE = {
    "module": r"holds more than data \(torch\.nn\.modules\.linear\.Linear\), which is not run",
    "list": "holds a list, not tensors by name",
    "no tensors": "holds no tensors by name, but 'epoch'",
    "cut": r"cut short: the end of the archive is missing \(9000 bytes",
    "cut pickle": r"the pickle in it is broken \(.*[a-z]{4}",
    "flipped": r"data/0 are not those that were written \(checksum\)",
    "empty": "it is empty",
    "page": "it is a web page",
    "text": r"it starts with b'hello hello hell'",
    "letters": r"the pickle in it is broken \(.*[a-z]{4}",
    "pointer": "it is a pointer of Git LFS",
}
"""What the message says of each kind."""
