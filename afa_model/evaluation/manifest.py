"""What a folder of pseudo-labels was made by and what is finished in it, shared by processes and machines.

``manifest.json`` has the settings, and the images when a process ends. Meanwhile each process appends a line for each
finished image to a file of its own, ``finished/I_of_N.jsonl``, so none waits for another, and a kill loses one image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.files import digest
from ..errors import ConfigError, reason
from ..runtime.writing import refuse_to_mix, whole

MANIFEST, FINISHED, LIST = "manifest.json", "finished", "train.txt"


class Manifest:
    """The record of a folder.

    Args:
        out: the folder; it is there.
        about: ``checkpoint`` (with its ``sha256``), ``class_names`` and ``settings``.
        share: which share of the images this process has, from 0, of how many.

    Attributes:
        images: name -> entry of what was finished when this process began, and what it finished since.

    Raises:
        ConfigError: the folder was made by other settings or another checkpoint, or its manifest cannot be read.
    """

    def __init__(self, out: Path, about: Mapping[str, Any], share: tuple[int, int] = (0, 1)):
        self.out, self.about = out, json.loads(json.dumps(about))
        self._path = out / MANIFEST
        before = self._before()
        if before is not None:
            refuse_to_mix(out, _compared(before), _compared(self.about), "pseudo-labels that were made otherwise")
        self.images = self._finished()
        self._own = out / FINISHED / f"{share[0] + 1}_of_{share[1]}.jsonl"
        if before is None:
            self._write(self.images)

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """An image is finished, and all its files are written."""
        self._own.parent.mkdir(exist_ok=True)
        with self._own.open("ab+") as file:
            line = json.dumps({"name": name, **entry}) + "\n"
            if file.tell() and _last_byte(file) != b"\n":  # a kill cut the last line
                line = "\n" + line
            file.write(line.encode())
        self.images[name] = dict(entry)

    def write(self) -> None:
        """Write manifest and list of all that any process has finished.

        Of processes that end together the last to write must not write less than another knew: each looks again
        afterwards whether something was finished meanwhile.
        """
        stamp = None
        while stamp != (stamp := self._stamp()):
            self._write(self._finished())

    def _write(self, images: Mapping[str, Mapping[str, Any]]) -> None:
        # an image a line: there are thousands
        parts = [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in self.about.items()]
        lines = (f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(images.items()))
        listed = ",\n".join(lines)
        parts.append(f'"images": {{\n{listed}\n}}' if images else '"images": {}')
        with whole(self._path) as file:
            file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        names = [name for name, entry in sorted(images.items()) if "labels" in entry["files"]]
        with whole(self.out / LIST) as file:
            file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

    def _before(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            _compared(content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = f"{self._path} cannot be read ({reason(error)})"
            raise ConfigError(f"out: {told}; remove it if the folder's files are of these settings") from None
        return content

    def _parts(self) -> list[Path]:
        return sorted((self.out / FINISHED).glob("*.jsonl"))

    def _stamp(self) -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in self._parts()]

    def _finished(self) -> dict[str, dict[str, Any]]:
        images: dict[str, dict[str, Any]] = {}
        for path in self._parts():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    images[entry.pop("name")] = entry
                except ValueError:  # a kill cut it; its image will be made again
                    continue
        return images


def same_photo(path: Path, entry: Mapping[str, Any] | None) -> tuple[bool, dict[str, Any]]:
    """Whether an entry was made of what is in this file now, and what an entry of today says of the file.

    Size and time say so at once; else the contents do: an edited bitmap has the size it had, a copy another time.
    """
    stat = path.stat()
    about = {"photo": str(path), "bytes": stat.st_size, "changed": stat.st_mtime_ns}
    keys = ("photo", "bytes", "changed")
    if entry is not None and "sha256" in entry and all(entry.get(key) == about[key] for key in keys):
        return True, {**about, "sha256": entry["sha256"]}
    about["sha256"] = digest(path)
    return entry is not None and entry.get("sha256") == about["sha256"], about


def _last_byte(file: Any) -> bytes:
    file.seek(-1, 2)
    return file.read(1)


def _compared(content: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all files of a folder; a checkpoint may have been moved."""
    checkpoint = f"of sha256 {content['checkpoint']['sha256'][:12]}"
    usual = {"amp": "off"}  # of folders that do not say so
    return {"checkpoint": checkpoint, "class_names": content["class_names"], **usual, **content["settings"]}
