"""How processes that start together find each other in a store that remembers those before them."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_PAUSE = 0.05  # seconds between two looks at the store


def agreed_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the processes started together have in common, and with no others before or after them.

    ``torchrun`` keeps one store over all its restarts, and what it tells of their number is each machine's own count:
    where one process of two machines was killed, one machine counts a restart and the other none. So process 0 calls
    out a new name, every other one answers it with a word of its own, and all go on by that name once process 0 has
    repeated their words. What is called out by a process that is dead is never repeated to one that is alive.

    Args:
        store: that all of them see.
        rank: this process's number, 0..world_size-1.
        world_size: how many there are.
        timeout: how long to wait for the others; for what is not in the store yet its own counts.

    Raises:
        torch.distributed.DistStoreError: some did not come in time.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("afa called", word)
        answers = [store.get(f"{word} answer {other}") for other in range(1, world_size)]
        store.set(f"{word} heard", b" ".join(answers))
        return word
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("afa called").decode()
        store.set(f"{name} answer {rank}", word)
        if store.check([f"{name} heard"]) and word.encode() in store.get(f"{name} heard").split():
            return name
        time.sleep(_PAUSE)
    raise dist.DistStoreError(f"timed out after {timeout.total_seconds():g} seconds waiting for all to come together")
