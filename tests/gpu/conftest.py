"""The emulator, built once for all files of this room."""

from __future__ import annotations

import pytest
from support.cuda_emulator import build


@pytest.fixture(scope="session")
def emulator() -> build.Emulator:
    return build.load()


@pytest.fixture(scope="session", params=build.kinds())
def either(request) -> build.Emulator:
    """The emulator with products fused into sums, as a GPU's compiler does; see `build.kinds`."""
    return build.load(request.param)
