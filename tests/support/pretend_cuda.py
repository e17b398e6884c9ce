"""The fixture ``pretend_cuda``: CUDA graphs' bookkeeping without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from afa_model.training import acceleration
from afa_model.training.acceleration import GraphedFunction


@pytest.fixture
def pretend_cuda(monkeypatch):
    """GraphedFunction's bookkeeping without a GPU: replays run the function on the static inputs once more."""
    replays = []

    def capture(self, inputs, options):
        places = [None if x is None else x.detach().clone() for x in inputs]
        outputs = self._function(*places, **options)

        def replay():
            replays.append(options)
            for out, new in zip(outputs, self._function(*places, **options)):
                if out is not None:
                    out.copy_(new)

        return SimpleNamespace(replay=replay), places, outputs

    monkeypatch.setattr(GraphedFunction, "_capture", capture)
    monkeypatch.setattr(acceleration, "_on_gpu", lambda tensor: True)
    return replays
