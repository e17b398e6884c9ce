"""Names in pictures: data, never mathematics, in a font that has their letters or else as escapes."""

from __future__ import annotations

from functools import lru_cache

from matplotlib import font_manager
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

_USUAL = "DejaVu Sans"  # comes with matplotlib


def write(text: Text, words: str) -> Text:
    """Let ``text`` show exactly these words, ``$`` and all; letters that no font has as escapes such as ``\\u7167``."""
    shown, families = readable(words)
    text.set_parse_math(False)
    text.set_text(shown)
    text.set_fontfamily(families)
    return text


def readable(words: str) -> tuple[str, list[str]]:
    """The words with escapes where nothing can be drawn, and the font families that have their letters."""
    words = "".join(letter if letter.isprintable() else _escape(letter) for letter in words)
    missing = frozenset(letter for letter in words if not _has(_path_of(_USUAL), letter))
    family = _family_with(missing) if missing else None
    if missing and family is None:
        words = "".join(_escape(letter) if letter in missing else letter for letter in words)
    return words, [_USUAL] if family is None else [_USUAL, family]


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@lru_cache(maxsize=1)
def _path_of(family: str) -> str:
    return font_manager.findfont(family)


def _has(path: str, letter: str) -> bool:
    return font_manager.get_font(path).get_char_index(ord(letter)) != 0


@lru_cache(maxsize=256)
def _family_with(letters: frozenset[str]) -> str | None:
    """An installed family that has all these letters."""
    for font in font_manager.fontManager.ttflist:
        if "emoji" in font.name.lower() or "last resort" in font.name.lower():  # no outlines to draw
            continue
        try:
            if all(_has(font.fname, letter) for letter in letters):
                return font.name
        except (OSError, RuntimeError):  # gone, or a format that cannot be drawn
            continue
    return None


def width_of(words: str, size: float) -> float:
    """Inches that :func:`write` needs for these words in a font of ``size`` points."""
    shown, families = readable(words)
    properties = font_manager.FontProperties(family=families, size=size)
    return text_to_path.get_text_width_height_descent(shown, properties, ismath=False)[0] / 72


def fitted(words: str, size: float, inches: float) -> str:
    """The words, or as many of their letters as there is room for, with an ellipsis in the place of the others."""
    if width_of(words, size) <= inches:
        return words
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = width_of(words[:middle].rstrip() + "…", size) <= inches
        low, high = (middle, high) if fits else (low, middle - 1)
    return words[:low].rstrip() + "…"


def wrapped(words: str, size: float, inches: float) -> list[str]:
    """The words in lines of at most so many inches; a word that is longer is cut."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= inches:
            lines[-1] = longer
        else:
            lines.append(fitted(word, size, inches))
    return lines or [""]
