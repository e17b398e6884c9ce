"""What the files of tests on the emulator have in common: ``pytestmark = ON_THE_EMULATOR``."""

from __future__ import annotations

import pytest

from ..common import DEVICE
from . import build

ON_THE_EMULATOR = [
    pytest.mark.cuda_emulator,
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler to build the emulator with"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the emulator reads the host's memory"),
]
