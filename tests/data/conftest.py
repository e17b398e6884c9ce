"""Fixtures of more than one file."""

import pytest
from support.piles import two_classes


@pytest.fixture
def pile(tmp_path):
    return two_classes(tmp_path)
