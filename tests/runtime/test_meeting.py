"""Processes that start together meet, whatever those before them left in the store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from afa_model.runtime.meeting import agreed_name

SOON = timedelta(seconds=10)


@pytest.fixture
def store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(SOON)
    return store


def meet(store: dist.Store, delays: list[float]) -> list[str]:
    """The names that so many processes agree upon, each of which comes after its delay."""
    names = [""] * len(delays)

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        names[rank] = agreed_name(store, rank, len(delays), SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("delays", [[0, 0.1, 0], [0.2, 0, 0.1]])
def test_those_who_come_after_a_restart_have_a_name_of_their_own(store, delays):
    rounds = [meet(store, delays) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in rounds)
    assert len({names[0] for names in rounds}) == 3


def test_those_who_died_before_they_had_met_mislead_nobody(store):
    store.set("afa called", "the dead one's")  # who died before any answer came
    store.set("the dead one's answer 1", "of another dead one")
    names = meet(store, [0.2, 0])
    assert names[0] == names[1] != "the dead one's"
    store.set("afa called", "another's")
    store.set("another's heard", "of another dead one")  # who died after it
    names = meet(store, [0.2, 0, 0])
    assert len(set(names)) == 1 and names[0] != "another's"


def test_one_who_waits_in_vain_is_told(store):
    store.set("afa called", "a dead one's")
    with pytest.raises(dist.DistStoreError, match=r"timed out after 0\.2 seconds"):
        agreed_name(store, 1, 2, timedelta(seconds=0.2))
