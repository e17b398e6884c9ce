"""Text files as people's editors write them: with a byte-order mark, in UTF-16, by Windows."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ..errors import DataError
from ..runtime.notices import notice

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins its own
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32 (with or, but for UTF-32, without a mark) or else in cp1252.

    Raises:
        DataError: none of these; FileNotFoundError if there is no file.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError:
        try:
            text = content.decode("cp1252")
            notice(f"cp1252 {path}", f"{path} is not in UTF-8: read as cp1252")
        except UnicodeDecodeError:
            raise DataError(f"{path}: text in neither UTF-8, UTF-16 nor cp1252") from None
    if "\0" in text:
        raise DataError(f"{path}: no text (it holds zero bytes)")
    return text


def encoding_of(content: bytes) -> str:
    """The encoding that the first bytes tell, else UTF-8."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    # Without a mark: of most letters one of the two bytes is zero, always the same one.
    even, odd = content[:512:2].count(0), content[1:512:2].count(0)
    if max(even, odd) > 0.4 * len(content[:512]) / 2 and min(even, odd) == 0:
        return "utf-16-be" if even else "utf-16-le"
    return "utf-8"


def lines_of(path: str | Path) -> list[tuple[int, str]]:
    """(number from 1, text without white space around it) of all lines that hold something.

    Raises:
        DataError: as :func:`read_text`.
    """
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path))]
    return [(number, line) for number, line in enumerate(lines, 1) if line]
