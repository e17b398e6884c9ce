"""README.md, its neighbours and the pages of docs/: their texts, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator

from support.common import ROOT

TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PATHS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
FENCED = re.compile(r"^```(\w*)\n.*?^```$", re.S | re.M)


def without_code(text: str) -> str:
    """A Markdown text without its code: fenced, indented, or within a line."""
    text = FENCED.sub("", text)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n|\n)+", "", text)
    return re.sub(r"`[^`\n]+`", "", text)


def links(text: str) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every link and picture that leads into the repository; either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Anchors of a text's headings that are the same on GitHub and on the site."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    plain = [re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles]
    github = [re.sub(r"\s", "-", title) for title in plain]
    site = [re.sub(r"[-\s]+", "-", title) for title in plain]
    return {one for one, other in zip(github, site) if one == other}
