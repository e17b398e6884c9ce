"""`afa serve` as people type it: what it serves, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.commands.serve import examples_for, settings_of
from afa_model.config import Config
from afa_model.data.settings import DataSettings
from afa_model.networks.afa import AFA
from afa_model.runs.restore import Restored
from afa_model.web.settings import ServeSettings

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of three classes in a folder as the Hub keeps one."""
    torch.manual_seed(5)
    model = AFA("mit_b0", 3, embedding=16, backbone_args=SMALL)
    model.class_names, model.about = ("background", "cat", "dog <i>"), {"iteration": 7}
    path = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def pages(monkeypatch):
    """The pages that are built and where; in the place of serving them the process is told to end."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'afa[serve]'")
    from afa_model.web import serving

    class Pages(list):
        end = signal.SIGTERM

    built = Pages()

    @contextlib.contextmanager
    def instead(build, settings):
        built.append((build(), settings))
        threading.Timer(0.2, os.kill, (os.getpid(), built.end)).start()
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(serving, "serving", instead)
    return built


def words_of(page) -> str:
    return str(page.get_config_file())


def test_a_checkpoint_is_served_until_the_process_is_told_to_end(folder, pages, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["serve", "--port", "0", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "trained for 7 steps, on cpu: open http://127.0.0.1:1 (Ctrl-C ends it)" in printed
    ((page, settings),) = pages
    shown = words_of(page)
    assert "cat" in shown and "affinity of the point" in shown and "3 classes" in shown
    assert settings == ServeSettings(port=0) and signal.getsignal(signal.SIGTERM) is before


def test_it_ends_without_looking_through_all_that_was_imported(pages, monkeypatch):
    """Seconds of Python's last collection, after the last line of ours."""
    at_the_end = []
    monkeypatch.setattr("atexit.register", at_the_end.append)
    assert cli.main(["serve"]) == 0
    assert gc.freeze in at_the_end


def test_without_a_checkpoint_masks_are_refined(pages, capsys):
    assert cli.main(["serve", "--host=0.0.0.0", "--max-megabytes", "3"]) == 0
    ((page, settings),) = pages
    assert "refine a mask" in words_of(page) and "affinity of the point" not in words_of(page)
    assert settings.host == "0.0.0.0" and settings.max_megabytes == 3
    assert capsys.readouterr().out.startswith("masks are refined, on ")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals of this system tell nobody that they close")
def test_a_terminal_that_closes_ends_it_in_order(pages):
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)  # what would end these tests ends this one
    try:
        pages.end = signal.SIGHUP
        assert cli.main(["serve"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["/nowhere"], "checkpoint /nowhere: no such file"),
        (["--port", "70000"], "port: expected 0..65535, got 70000"),
        (["--prot", "7000"], "prot: unknown setting (did you mean port?)"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N"),
        (["--long-side", "8"], "long_side: expected 32..4096 pixels"),
    ],
)
def test_mistakes_are_one_line(capsys, line, message):
    assert cli.main(["serve", *line]) == 2
    assert capsys.readouterr().err.startswith(f"afa serve: error: {message}")


def test_a_folder_without_examples_is_a_mistake(folder, pages, tmp_path, capsys):
    assert cli.main(["serve", str(folder), "--examples", str(tmp_path)]) == 2
    assert "examples: no photograph in" in capsys.readouterr().err and pages == []


def test_a_port_that_is_taken_is_told(capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'afa[serve]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"port: cannot listen at 127.0.0.1:{port} (" in told and "--port 0 takes one that is free" in told
    assert cli.main(["serve", "--host", "no such host"]) == 2
    assert "host: 'no such host' is no address" in capsys.readouterr().err


def test_without_gradio_the_command_that_brings_it_is_told_and_help_is_there(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("afa_model.web.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "[CHECKPOINT]" in printed and "--max_megabytes" in printed
    assert cli.main(["serve"]) == 2
    told = "gradio is not installed (afa serve shows its page with it): pip install 'afa[serve]'"
    assert capsys.readouterr().err == f"afa serve: error: {told}\n"


def test_examples_are_those_of_the_validation_set_where_it_is_here(tmp_path):
    names = make_voc(tmp_path / "voc", 8)
    run = Restored(None, Config(data=DataSettings("voc")), (), Path("best.pt"), 7, str(tmp_path))
    assert [each.name for each in examples_for(run, ServeSettings())] == [f"{name}.jpg" for name in names[:6]]
    own = ServeSettings(examples=str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "own" / "mine.png")
    assert [each.name for each in examples_for(run, own)] == ["mine.png"]
    gone = Restored(None, Config(data=DataSettings("elsewhere")), (), Path("best.pt"), 7, str(tmp_path))
    assert all(each.name.startswith("generated") for each in examples_for(gone, ServeSettings()))


def test_a_run_is_served_by_the_settings_that_predict_has():
    config = Config()
    config.labels.low_score = 0.2
    sizes, how = settings_of(Restored(None, config, (), Path("best.pt"), 7))
    assert sizes == config.eval.by("test").maps() and sizes.long_side == 512 and how.low_score == 0.2
