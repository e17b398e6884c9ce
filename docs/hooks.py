"""What pages of the site take from elsewhere, so that nothing is written twice and nothing goes stale.

A line of its own in a page stands for a text that is made when the site is:

    <!-- readme: Speed -->        a section of README.md, without its heading
    <!-- changelog -->            CHANGELOG.md, without its title
    <!-- speed: par -->           the measurements of an operator that are kept in benchmarks/results
    <!-- plans -->                which plan PAR takes on which GPU
    <!-- settings -->             every setting of a run, from the dataclasses; what the packaged files set
    <!-- commands -->             what each `afa COMMAND --help` prints

and links that lead out of docs/ lead to the README's section where that is shown, or to a copy of the file. MkDocs
calls the functions at the end. Without it `python docs/hooks.py FOLDER` writes all pages as plain Markdown, for any
other tool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FILES = "files"  # where on the site files from outside docs/ lie
MARKER = re.compile(r"^<!-- (readme|changelog|speed|settings|commands|plans)(?:: (.+))? -->$", re.M)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
HEADING = re.compile(r"^(#+) (.+)$", re.M)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def pages() -> list[str]:
    """Every page, as its path below docs/."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@functools.cache
def filled(page: str) -> str:
    """A page's Markdown with its markers and outward links replaced.

    Raises:
        ValueError: a marker asks for what is not there.
    """
    made = {"readme": _readme, "changelog": _changelog}
    made |= {"speed": _speed, "settings": _settings, "commands": _commands, "plans": _plans}
    text = _relinked((DOCS / page).read_text(encoding="utf-8"), page, DOCS / page)
    return MARKER.sub(lambda found: made[found[1]](page, found[2]), text)


def outside(page: str) -> Iterator[str]:
    """Files outside docs/ that a page, as it is filled, leads to: their paths below the repository."""
    for found in LINK.finditer(filled(page)):
        place = os.path.normpath(os.path.join(os.path.dirname(page), found[2]))
        if place.startswith(f"{FILES}/"):
            yield place[len(FILES) + 1 :]


# --- the README -------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor, as Python-Markdown makes it."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def headings(text: str) -> list[re.Match[str]]:
    """The headings of a Markdown text: (hashes, words); lines of fenced code are none."""
    code = [block.span() for block in FENCE.finditer(text)]
    return [found for found in HEADING.finditer(text) if not any(a <= found.start() < b for a, b in code)]


def section(title: str) -> str:
    """A section of the README with all below it, its heading left out and those below raised by a level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = headings(text)
    for place, heading in enumerate(found):
        if heading[2] == title:
            level = len(heading[1])
            end = next((each.start() for each in found[place + 1 :] if len(each[1]) <= level), len(text))
            return re.sub(rf"^#(#{{{level},}} )", r"\1", text[heading.end() : end].strip("\n"), flags=re.M)
    raise ValueError(f"README.md has no section {title!r}")


def _readme(page: str, title: str) -> str:
    return _relinked(section(title), page, ROOT / "README.md")


def _changelog(page: str, nothing: None) -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return _relinked(text[text.index("\n") :].strip(), page, ROOT / "CHANGELOG.md")


def _shown() -> dict[str, str]:
    """The page on which each of the README's headings is shown, by the heading's anchor."""
    places = {}
    for page in pages():
        for found in MARKER.finditer((DOCS / page).read_text(encoding="utf-8")):
            if found[1] == "readme":
                inner = [heading[2] for heading in headings(section(found[2]))]
                places |= {slug(found[2]): page} | {slug(name): f"{page}#{slug(name)}" for name in inner}
    return places


def _relinked(text: str, page: str, source: Path) -> str:
    """The links of a text that stands in ``source``, so that they are right on ``page``."""

    def replaced(found: re.Match[str]) -> str:
        target, anchor = (source.parent / found[2]).resolve(), found[3] or ""
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]  # no link but code; or one that leads nowhere, as the build will tell
        if target.name == "README.md" and target.parent == ROOT:
            place = _shown().get(anchor[1:], "index.md")
            anchor = ""
        elif target.is_relative_to(DOCS):
            place = target.relative_to(DOCS).as_posix()
        else:
            place = f"{FILES}/{target.relative_to(ROOT).as_posix()}"
        return found[1] + os.path.relpath(place, os.path.dirname(page) or ".") + anchor + found[4]

    return LINK.sub(replaced, text)


# --- measurements -----------------------------------------------------------------------------------------------------


def _speed(page: str, operator: str) -> str:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme_table
    finally:
        sys.path.pop(0)
    kept = [row for row in readme_table.reports(ROOT / "benchmarks" / "results") if row.get("operator") == operator]
    if not (ROOT / "afa_kernels" / "ops" / operator).is_dir() and not kept:
        raise ValueError(f"{page}: there is no operator {operator!r}")
    if not kept:
        return f"No measurement of it is kept; `python benchmarks/run.py {operator}` makes one, beside plain PyTorch."
    about = [f"{report['machine']['date']}, commit `{report['machine']['commit']}`" for report in kept]
    return f"{readme_table.tables(kept)}\n\nMeasured {'; '.join(about)}, by `python benchmarks/run.py {operator}`."


# --- settings ---------------------------------------------------------------------------------------------------------


def _type(kind: Any) -> str:
    """A type as one would say it: ``int or null``, ``auto, file, xml or masks``."""
    if get_origin(kind) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(kind))
    if kind is type(None):
        return "`null`"
    inner = get_args(kind)
    if str(kind).startswith(("typing.Union", "typing.Optional")) or " | " in str(kind):
        return " \\| ".join(_type(each) for each in inner)
    return f"`{kind.__name__}`" if not inner else "`" + re.sub(r"typing\.", "", str(kind)).replace("|", "\\|") + "`"


def _meanings(kind: type) -> dict[str, str]:
    """What a settings dataclass, and those that it extends, say of each field."""
    import docstring_parser

    said = {}
    for owner in reversed(kind.__mro__):
        for row in docstring_parser.parse(owner.__doc__ or "").params:
            said[row.arg_name] = " ".join((row.description or "").split())
    return said


def _value(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool) or value == "":
        return {None: "`null`", True: "`true`", False: "`false`", "": '`""`'}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, meaning) of all fields of a dataclass, those of its parts too."""
    kinds, meanings = get_type_hints(kind), _meanings(kind)
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from fields(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kinds[field.name], default, meanings[field.name]


def _settings(page: str, _: str | None) -> str:
    import yaml

    from afa_model.config import Config, packaged
    from afa_model.config.parser import CONFIG_FOLDER, flatten

    files = {name: flatten(yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text()) or {}) for name in packaged()}
    blocks: dict[str, list[str]] = {}
    for key, kind, default, meaning in fields(Config):
        plain = list(default) if isinstance(default, tuple) else default
        others = [f"{name} {_value(value[key])}" for name, value in files.items() if value.get(key, plain) != plain]
        cell = meaning.replace("|", "\\|")
        row = f"| `{key}` | {_type(kind)} | {_value(default)} | {', '.join(others)} | {cell} |"
        blocks.setdefault(key.partition(".")[0] if "." in key else "", []).append(row)
    parts = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
    made = []
    for name, rows in blocks.items():
        about = (Config if not name else parts[name]).__doc__.partition("\n")[0]
        made += [f"## {name or 'the run'}", "", about, ""]
        made += ["| setting | type | default | in a packaged file | |", "|---|---|---|---|---|", *rows, ""]
    return "\n".join(made)


# --- commands ---------------------------------------------------------------------------------------------------------


def _plans(page: str, _: str | None) -> str:
    from afa_kernels.ops.diffusion import plans

    return plans.table()


def printed(*words: str) -> str:
    """What `afa` prints, in lines of 110 characters."""
    from afa_model.cli import main

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main(words)
    finally:
        os.environ.pop("COLUMNS")
        os.environ |= {"COLUMNS": before} if before is not None else {}
    return out.getvalue()


def _commands(page: str, _: str | None) -> str:
    from afa_model.cli import COMMANDS, SUBCOMMANDS

    made = []
    for name, about in COMMANDS.items():
        made += [f"## afa {name}", "", f"{about[0].upper()}{about[1:]}.", ""]
        for words in [(name,), *((name, inner) for inner in SUBCOMMANDS.get(name, ()))]:
            text = printed(*words, "--help").rstrip()
            if name == "train":  # all settings, which have a page of their own
                text = text.partition("\n\noptions:")[0]
            made += [f"    $ afa {' '.join(words)} --help", *(f"    {line}".rstrip() for line in text.split("\n")), ""]
    return "\n".join(made)


# --- called by MkDocs -------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/ and is linked to."""
    filled.cache_clear()  # `mkdocs serve` builds again when a file has changed
    from mkdocs.structure.files import File

    for path in sorted({path for page in pages() for path in outside(page)}):
        files.append(File.generated(config, f"{FILES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill a page in."""
    return filled(page.file.src_uri)


def main(folder: Path) -> None:
    """Write all pages filled, and all else of docs/, into a folder."""
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"), dirs_exist_ok=True)
    for page in pages():
        (folder / page).write_text(filled(page), encoding="utf-8")
        for path in outside(page):
            (folder / FILES / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / FILES / path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
