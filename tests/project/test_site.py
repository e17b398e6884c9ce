"""The site: every page is in its navigation, what is generated is there and is what the code says, it builds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys

import numpy as np
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


def script(name: str):
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return script("hooks")


def paths(nav) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [path for each in (nav.values() if isinstance(nav, dict) else nav) for path in paths(each)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(paths(SITE["nav"])) == sorted(PAGES)


def test_the_changelog_is_shown_whole(hooks):
    text = (ROOT / "CHANGELOG.md").read_text()
    assert hooks.filled("changelog.md").split("\n", 1)[1].strip() == text.split("\n", 1)[1].strip()


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
    assert not {"extra", "extra_javascript", "repo_url"} & set(SITE)
    assert all((ROOT / "docs" / path).is_file() for path in SITE["extra_css"])
    assert "url(" not in (ROOT / "docs" / "site.css").read_text()


# --- what is generated ------------------------------------------------------------------------------------------------


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
    assert hooks.section("The house").startswith("    csrc/")  # code, as it is indented there
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
    assert shown["seed"] == "`0`" and shown["compile"] == "`auto`" and shown["loss.regularisation"] == "`0.0`"
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


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_kernels_are_what_their_script_draws(tmp_path):
    drawn = script("kernel_pictures")
    drawn.main(tmp_path)
    kept = {path.name: path.read_text() for path in drawn.FOLDER.iterdir()}
    assert kept == {path.name: path.read_text() for path in tmp_path.iterdir()}
    for text in kept.values():
        below = re.findall(r">(csrc/[^<]+)<", text)[0].split(", ")
        folder = (ROOT / below[0]).parent
        assert all((folder / name.rpartition("/")[2]).is_file() for name in below)


def test_pictures_of_operators_can_be_drawn_anew():
    drawn = script("pictures")
    for each in drawn.PICTURES:
        panels = each()
        assert (drawn.FOLDER / f"{each.__name__}.png").is_file() and len(panels) >= 3
        for title, values in panels:
            assert values.shape[2:] in ((), (3,)) and np.isfinite(values).any() and np.nanstd(values) > 0, title


# What the pictures and the page about the kernels say of the sources: draw and write anew where one has changed.
NUMBERS = {
    "diffusion/plan.h": ("kHeldTaps = 16, kHeldPixels = 2", "kResidentChannels = 4"),
    "diffusion/stream.cu": ("kAhead = kChannels > 4 ? 4 : 6", "up to 7 channels"),
    "par/par.cu": ("kTileW = 32, kTileH = 16",),
    "affinity/affinity.cuh": ("tiles of 8 x 8",),
    "random_walk/walk.cuh": ("kWalkPixels = 32, kWalkGroups = 8",),
    "bilateral/exact.cuh": ("kTile = 64", "kLeftOut = 1e-6f"),
    "path_affinity/path_affinity.cu": ("kPathW = 32, kPathRows = 8, kPathH = 2 * kPathRows",),
    "feature_affinity/feature_tiles.cuh": ("kTileRows = 4, kTileColumns = 32, kPixels = 4, kRun = 9",),
    "feature_affinity/feature_affinity.cu": ("kChannels = 8",),
    "sinkhorn/sinkhorn.cu": ("kSinkhornPixels = 8, kSinkhornGroups = 32",),
}


@pytest.mark.parametrize("source", NUMBERS)
def test_the_sources_have_the_numbers_that_are_told_of_them(source):
    text = (ROOT / "csrc" / source).read_text()
    assert [number for number in NUMBERS[source] if number not in text] == []


# --- lines to type ----------------------------------------------------------------------------------------------------


def typed(text: str) -> list[list[str]]:
    """The words behind `afa` of every line in a document's indented code."""
    lines = re.sub(r"\\\n\s+", " ", text).split("\n")
    found = [re.match(r" {4,}(?:\$ )?(?:torchrun .*-m afa_model|afa) ([a-z][\w-]*(?: .*)?)$", line) for line in lines]
    return [re.split(r"\s+#|\s{4,}", each[1])[0].split() for each in found if each]


def test_lines_to_type_have_commands_and_options_that_there_are(hooks):
    helps = dict(re.findall(r"^## afa ([\w-]+)$(.*?)(?=^## |\Z)", hooks.filled("commands.md"), re.M | re.S))
    settings = {f"--{key}" for key in parser("afa train", "").known_settings()}
    known = {name: {*re.findall(r"--[\w.]+", text), "--help"} for name, text in helps.items()}
    known |= {name: known[name] | settings for name in ("train", "demo", "bench", "reproduce")}
    count, wrong = 0, []
    for document, text in DOCUMENTS.items():
        for command, *words in typed(text):
            options = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in words]
            options = [word for word in options if word.startswith("--") and len(word) > 2]
            count += 1
            unknown = [word for word in options if word not in known.get(command, ())]
            if command not in COMMANDS or unknown:
                wrong.append((document, command, unknown))
    assert count > 50 and wrong == []


# --- the site itself --------------------------------------------------------------------------------------------------


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
