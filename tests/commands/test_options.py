"""What commands on a checkpoint share: where a setting came from is told when it does not lead anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support.needs_command_line  # noqa: F401

from afa_model.commands.options import switched_on, told_of_the_run
from afa_model.config import Config
from afa_model.data.datasets import DataSettings
from afa_model.errors import DataError
from afa_model.runs.restore import Restored


def told(root: str, asked: str, folder: str | None) -> str:
    run = Restored(None, Config(data=DataSettings(root)), (), Path("runs/voc/best.pt"), 7, folder)
    with pytest.raises(DataError) as error, told_of_the_run(run, DataSettings(asked)):
        raise DataError(f"data root {asked} is not a folder")
    return str(error.value)


def test_a_relative_root_of_the_checkpoint_is_told_to_be_one():
    note = "data.root data/voc is what the checkpoint runs/voc/best.pt says; its run was started in "
    assert note + "/home/me: --data.root /home/me/data/voc" in told("data/voc", "data/voc", "/home/me")
    assert note + "another folder" in told("data/voc", "data/voc", None)


@pytest.mark.parametrize(
    ("root", "asked", "folder"),
    [("/data/voc", "/data/voc", "/home/me"), ("data/voc", "other", "/home/me"), ("data/voc", "data/voc", os.getcwd())],
)
def test_any_other_root_is_the_users_own(root, asked, folder):
    assert told(root, asked, folder) == f"data root {asked} is not a folder"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (["--crf", "a.jpg"], ["--crf=true", "a.jpg"]),
        (["a.jpg", "--crf"], ["a.jpg", "--crf=true"]),
        (["--crf", "--out", "x"], ["--crf=true", "--out", "x"]),
        (["--crf", "false", "a"], ["--crf", "false", "a"]),
        (["--crf", "true"], ["--crf", "true"]),
        (["--crf=false", "--crfs"], ["--crf=false", "--crfs"]),
        (["--", "--crf"], ["--", "--crf"]),
        (["--crf", "--", "true"], ["--crf=true", "--", "true"]),
    ],
)
def test_an_option_alone_is_switched_on(line, want):
    assert switched_on(line, "--crf") == want
