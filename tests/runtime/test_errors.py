"""Errors of other people's code, told with the user's file and in words."""

from __future__ import annotations

import struct
import zipfile

import pytest

from afa_model.errors import AfaError, CheckpointError, DataError, naming, reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError(101), "KeyError 101"),
        (KeyError("encoder weight"), "KeyError 'encoder weight'"),
        (EOFError(), "EOFError"),
        (struct.error("unpack requires 4 bytes"), "unpack requires 4 bytes"),
        (ValueError("\n  first line\nsecond"), "first line"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (zipfile.BadZipFile("101"), "BadZipFile 101"),
    ],
)
def test_a_reason_says_what_is_wrong(error, words):
    assert reason(error) == words


def test_the_systems_words_come_before_a_librarys():
    with pytest.raises(RuntimeError) as caught:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert reason(caught.value) == "No space left on device"


def test_a_foreign_error_names_the_file():
    with pytest.raises(DataError, match=r"^mask a\.png cannot be read: KeyError 7$"), naming("a.png", "mask"):
        {}[7]
    cut = naming("b", kind=CheckpointError, is_not="is cut")
    with pytest.raises(CheckpointError, match=r"^file b is cut: no end$"), cut:
        raise ValueError("no end")


def test_an_error_that_names_its_file_passes_and_a_stop_too():
    with pytest.raises(AfaError, match=r"^said already$"), naming("a.png"):
        raise AfaError("said already")
    with pytest.raises(KeyboardInterrupt), naming("a.png"):
        raise KeyboardInterrupt
