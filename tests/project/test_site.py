"""The site: every page is in its navigation, what is generated is there and is what the code says, it builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
import yaml
from support.common import ROOT
from support.documents import DOCUMENTS

import afa_kernels
from afa_model.cli import COMMANDS
from afa_model.config import Config
from afa_model.config.parser import parser

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [name.removeprefix("docs/") for name in DOCUMENTS if name.startswith("docs/")]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paths(nav) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [path for each in (nav.values() if isinstance(nav, dict) else nav) for path in paths(each)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(paths(SITE["nav"])) == sorted(PAGES)


def test_every_picture_is_shown():
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "images").rglob("*.*")}
    text = "".join(DOCUMENTS.values())
    assert {path for path in there if path.rpartition("/")[2] not in text} == set()


def test_every_public_name_is_explained_on_one_page():
    shown = re.findall(r"^::: afa_kernels\.(\w+)$", "\n".join(DOCUMENTS.values()), re.M)
    rows = {"CheckRow", "CheckTable"}  # what self_check returns, and says so
    assert sorted(shown) == sorted(set(afa_kernels.__all__) - rows)


def test_nothing_is_fetched_by_a_reader():
    assert SITE["theme"]["font"] is False
    assert not {"extra", "extra_javascript", "extra_css", "repo_url"} & set(SITE)


# --- what is generated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page != "commands.md"])
def test_markers_are_filled_and_links_lead_to_pages_or_files(hooks, page):
    text = hooks.filled(page)
    assert not hooks.MARKER.search(text)
    for path in hooks.outside(page):
        assert (ROOT / path).is_file()
    assert "](../README.md" not in text and "](docs/" not in text


def test_the_readme_is_shown_with_its_links_from_there(hooks):
    text = hooks.filled("train.md")
    assert "[protocol.md](protocol.md)" in text or "[docs/protocol.md](protocol.md)" in text
    assert "\n## The demo\n" in text and "### The demo" not in text
    assert "(../files/benchmarks" not in text
    assert "(train.md)" in hooks.filled("second_stage.md")  # the README's section is shown there
    assert "(files/benchmarks/results/real_cams.png)" in hooks.filled("real_cams.md")


def test_what_is_not_there_is_an_error(hooks):
    with pytest.raises(ValueError, match="no section 'Nowhere'"):
        hooks.section("Nowhere")
    with pytest.raises(ValueError, match=r"page.md: there is no operator 'nothing'"):
        hooks._speed("page.md", "nothing")


def test_speed_tables_name_operator_machine_and_day(hooks):
    text = hooks.filled("operators/random_walk.md")
    assert re.search(r"^\| random_walk \| N=4096, 21 channels, 2 steps \|.+x \|", text, re.M)
    assert "| par |" not in text and re.search(r"^\*\*.+ threads\*\*, torch", text, re.M)
    assert re.search(r"Measured \d{4}-\d\d-\d\d, commit `\w{7,}`", text)


def test_every_setting_is_explained_with_its_default(hooks):
    text = hooks.filled("settings.md")
    shown = dict(re.findall(r"^\| `([\w.]+)` \| .+? \| (`[^`]*`) \|", text, re.M))
    made = parser("afa train", "")
    known = {action.dest for action in made._actions if action.option_strings and action.dest not in ("help", "config")}
    groups = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    assert set(shown) == {name for name in known - groups if name != "print_config"}
    assert shown["schedule.max_iters"] == f"`{Config().schedule.max_iters}`"
    assert shown["data.label_file"] == "`null`" and shown["augment.flip"] == f"`{Config().augment.flip}`"
    assert re.search(r"^\| `step.cam_iters` .+coco `5000`", text, re.M)


def test_types_are_said_in_words(hooks):
    assert hooks._type(int | None) == "`int` \\| `null`"
    assert hooks._type(Config.__dataclass_fields__["out"].type == "str" and str) == "`str`"
    assert hooks._type(tuple[float, ...]) == "`tuple[float, ...]`"


def test_every_command_is_there_with_its_help(hooks):
    text = hooks.filled("commands.md")
    assert re.findall(r"^## afa ([\w-]+)$", text, re.M) == list(COMMANDS)
    assert "--affinity_at" in text and "    $ afa prepare folder --help" in text
    of_train = text.partition("## afa train")[2].partition("## afa evaluate")[0]
    assert "usage: afa train" in of_train and "--step" not in of_train  # a run's settings have a page of their own


def test_all_pages_can_be_written_as_plain_markdown(hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "pages", lambda: ["real_cams.md", "operators/par.md"])
    hooks.main(tmp_path)
    assert (tmp_path / "files/benchmarks/results/real_cams.png").is_file() and (tmp_path / "images").is_dir()
    assert "Measured" in (tmp_path / "operators/par.md").read_text() and not list(tmp_path.glob("*.py"))


# --- the site itself ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES} <= set(pages)
    for text in pages.values():
        assert re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?https?:[^>]+", text) == []
    assert 'id="afa_kernels.par"' in pages["operators/par.html"]
    assert inspect.getdoc(afa_kernels.par).partition("\n")[0][:40] in pages["operators/par.html"]
