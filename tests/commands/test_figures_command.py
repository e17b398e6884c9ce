"""`afa figures` as people type it: checkpoints and photographs in, PNG and PDF out, and what is wrong told in words."""

from __future__ import annotations

import functools
import re
import shutil
import zlib

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.tiny_run import tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.data.files import write_label
from afa_model.pictures.sheets import DPI
from afa_model.runs.checkpoint import read, write_atomically
from afa_model.runs.restore import load_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=4)
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", *tiny_args(root, out, schedule__max_iters=1, checkpoint__every=1)]) == 0
    state = read(out / "iter_00000001.pt")
    return write_atomically(out / "small.pt", state | {"optimizer": {}})  # half the time to read


@pytest.fixture(scope="module")
def without(trained, tmp_path_factory):
    """A checkpoint whose run gave the affinity's loss no weight."""
    state = read(trained)
    state["config"]["step"]["aff_weight"] = 0.0
    state["model"]["encoder.block4.1.attn.q.weight"] += 0.3
    return write_atomically(tmp_path_factory.mktemp("without") / "other.pt", state)


@pytest.fixture
def afa(trained, tmp_path, monkeypatch):
    """``afa(figure, *words)`` runs the command and gives its exit code; the figures go to ``tmp_path / "out"``."""
    monkeypatch.setattr("afa_model.evaluation.figures.DPI", 60)  # seconds for each figure less
    for module in ("afa_model.commands.options", "afa_model.commands.figures"):
        monkeypatch.setattr(f"{module}.load_model", loaded)
    given = ["--checkpoint", str(trained), "--device", "cpu", "--out", str(tmp_path / "out")]
    return lambda *words: cli.main(["figures", *map(str, words), *given])


loaded = functools.cache(load_model)  # what is drawn changes no model


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are made but not drawn: their files hold nothing."""
    monkeypatch.setattr("afa_model.evaluation.figures.save", lambda figure, path, dpi: path.touch())


def photo(root, number: int = 0) -> str:
    return str(root / "JPEGImages" / f"2007_00000{number}.jpg")


def drawn_by(pdf) -> bytes:
    """What the page of a PDF says is to be drawn."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.S)
    return max((zlib.decompress(one) for one in streams if one[:1] == b"\x78"), key=lambda one: one.count(b" Td"))


def test_all_figures_are_written_and_told(afa, root, without, tmp_path, capsys):
    assert afa("all", photo(root), "--without", without) == 0
    printed, told = capsys.readouterr()
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted(
        f"figure_{number}.{kind}" for number in (3, 4, 5, 6, 7, 8) for kind in ("png", "pdf")
    )
    for number in (3, 4, 5, 6, 7, 8):
        with Image.open(out / f"figure_{number}.png") as picture:
            assert picture.info["Software"] == "afa" and picture.size[0] == pytest.approx(6.875 * 60, abs=1)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # not a blank sheet
        pdf = out / f"figure_{number}.pdf"
        assert pdf.read_bytes().count(b"/Type /Page ") == 1 and drawn_by(pdf).count(b" Td") >= 5  # pieces of text
        assert pdf.read_bytes().count(b"/Subtype /Image") >= (0 if number == 8 else 3)
        assert f"{out / f'figure_{number}.png'} and figure_{number}.pdf\n  Figure {number}. " in printed
    assert printed.count("Classes: from the masks.") == 3 and "left out: " not in printed
    assert "The CNN's CAM is left out, for no CNN is given (--cnn)." in printed and told == ""


def test_what_all_cannot_draw_is_left_out_and_named(afa, root, tmp_path, capsys, unsaved):
    assert afa("all", photo(root)) == 0
    printed = capsys.readouterr().out
    assert "left out: figure 7 compares with a model trained without AFA: --without CHECKPOINT" in printed
    assert "Labels of a model without AFA are left out, for none is given (--without)." in printed
    assert not (tmp_path / "out" / "figure_7.png").exists() and (tmp_path / "out" / "figure_5.png").exists()


def test_the_same_line_draws_the_same_files(afa, root, tmp_path):
    files = [tmp_path / "out" / f"figure_4.{kind}" for kind in ("png", "pdf")]
    before = []
    for _ in range(2):
        assert afa("4", photo(root), "--labels", "cat") == 0
        before.append([file.read_bytes() for file in files])
    assert before[0] == before[1]


def test_more_photographs_than_a_page_holds_go_on_others(afa, root, tmp_path, capsys, unsaved):
    (tmp_path / "broken.jpg").write_bytes(b"no photograph")
    assert afa("4", root / "JPEGImages", tmp_path / "broken.jpg", "--rows", "3") == 1
    printed, told = capsys.readouterr()
    assert "figure_4_1.png" in printed and (tmp_path / "out" / "figure_4_2.pdf").exists()
    assert "1 could not be drawn:" in told and f"{tmp_path / 'broken.jpg'}: cannot be decoded" in told


def test_a_photograph_too_large_for_its_attention_costs_no_others(afa, tmp_path, capsys, unsaved, monkeypatch):
    monkeypatch.setattr("afa_model.pictures.attention.MOST_CELLS", 12)
    for name, size in (("flat.png", (64, 32)), ("square.png", (64, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    assert afa("3", tmp_path / "square.png", tmp_path / "flat.png") == 1
    out, error = capsys.readouterr()
    assert "figure_3.png" in out and "1 could not be drawn" in error
    assert "an attention map of square.png of 16 x 16 cells is too large" in error


def test_classes_come_from_where_they_are_known(afa, root, tmp_path, capsys, unsaved):
    line = ["4", photo(root, 1)]
    table = tmp_path / "labels.json"
    table.write_text('{"2007_000001": ["cat"]}')
    shutil.copy(photo(root, 1), tmp_path / "alone.jpg")
    for words, source in (
        ([*line, "--labels", "cat,person"], "given by --labels"),
        ([*line, "--label_file", table], "from the label file"),
        (line, "from the masks"),
        (["4", tmp_path / "alone.jpg"], "found by the classifier"),
    ):
        assert afa(*words) == 0
        printed = capsys.readouterr().out
        assert f"Classes: {source}." in printed
        assert ("Ground truth is left out" in printed) == ("classifier" in source)


def test_masks_are_taken_from_a_folder(afa, root, tmp_path, capsys, unsaved):
    (tmp_path / "masks").mkdir()
    shutil.copy(photo(root), tmp_path / "mine.jpg")
    assert afa("6", tmp_path / "mine.jpg", "--masks", tmp_path / "masks") == 0
    assert "Ground truth is left out, for there are no masks." in capsys.readouterr().out
    shutil.copy(root / "SegmentationClassAug" / "2007_000000.png", tmp_path / "masks" / "mine.png")
    assert afa("6", tmp_path / "mine.jpg", "--masks", tmp_path / "masks") == 0
    assert "beside the ground truth." in capsys.readouterr().out
    write_label(tmp_path / "masks" / "mine.png", np.zeros((3, 5), np.uint8))
    assert afa("6", tmp_path / "mine.jpg", "--masks", tmp_path / "masks") == 2
    assert "mine.png: 5x3 pixels, its photograph has 64x48" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["9", "PHOTO"], "figure: expected 3, 4, 5, 6, 7, 8 or all, got '9'"),
        (["PHOTO"], "figure: expected 3, 4, 5, 6, 7, 8 or all, got "),
        (["5", "PHOTO"], "without: figure 5 compares with a model trained without AFA: --without"),
        (["7", "PHOTO"], "without: figure 7 compares with a model trained without AFA: --without"),
        (["4", "PHOTO", "--point", "64,3"], "point: expected a pixel X,Y inside 2007_000000.jpg (0..63, 0..47), got"),
        (["4", "PHOTO", "--point", "a"], "point: expected a pixel X,Y such as 200,120, got 'a'"),
        (["4", "PHOTO", "--labels", "dragon"], "labels: 'dragon'; expected some of aeroplane"),
        (["4", "PHOTO", "--rows", "0"], "rows: expected 1 to 12 photographs, got 0"),
        (["4", "PHOTO", "--masks", "nowhere"], "masks: nowhere is not a folder"),
        (["4", "PHOTO", "--label_file", "no.json"], "label_file no.json not found"),
        (["4"], "images: none given"),
        (["4", "nowhere.jpg"], "nowhere.jpg: not found"),
        (["4", "PHOTO", "--out", "FILE"], "out: expected a folder, but "),
        (["3", "PHOTO", "--cnn", "CHECKPOINT"], "cnn: expected a model with a CNN such as resnet50, got one with"),
        (["5", "PHOTO", "--without", "SMALL"], "without: SMALL has 20 classes, CHECKPOINT has 21"),
        (["5", "PHOTO", "--without", "OTHER"], "without: OTHER names other classes than CHECKPOINT: 'kite' in the"),
    ],
)
def test_mistakes_are_told_in_words(words, told, afa, root, trained, tmp_path, capsys, monkeypatch, unsaved):
    monkeypatch.chdir(tmp_path)
    state = read(trained)
    state["class_names"][5] = "kite"
    places = {"PHOTO": photo(root), "CHECKPOINT": str(trained), "FILE": str(tmp_path / "file")}
    (tmp_path / "file").write_text("")
    if "OTHER" in words:
        places["OTHER"] = str(write_atomically(tmp_path / "other.pt", state))
    if "SMALL" in words:
        state["class_names"] = state["class_names"][:20]
        state["model"] = {
            name: value[: len(value) - 1] if len(value.shape) > 0 and len(value) in (20, 21) else value
            for name, value in state["model"].items()
        }
        places["SMALL"] = str(write_atomically(tmp_path / "small.pt", state))
    if "--out" in words:
        assert cli.main(["figures", *(places.get(word, word) for word in words), "--checkpoint", str(trained)]) == 2
    else:
        assert afa(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    for word, place in places.items():
        told = told.replace(word, place)
    assert error.startswith("afa figures: error: ") and told in error
    assert not (tmp_path / "out").exists()


def test_a_model_trained_with_affinity_is_told_apart(afa, root, trained, capsys, unsaved):
    assert afa("7", photo(root), "--without", trained, "--point", "3,40") == 0
    assert "was trained with AFA (step.aff_weight 0.1), not without" in capsys.readouterr().err


def test_figure_8_needs_no_photograph_and_shows_the_checkpoint(afa, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("afa_model.evaluation.figures.DPI", DPI)
    assert afa("8") == 0
    with Image.open(tmp_path / "out" / "figure_8.png") as picture:
        assert picture.size[0] == pytest.approx(6.875 * 300, abs=1)
    weights = read(trained)["model"]["attn_proj.weight"].flatten()
    assert f"{int((weights < 0).sum())} of 16 (red)" in capsys.readouterr().out
    assert (tmp_path / "out" / "figure_8.pdf").stat().st_size > 5000
