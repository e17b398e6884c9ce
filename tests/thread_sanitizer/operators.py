"""The native CPU operators, four threads each, called from four Python threads at once: for ThreadSanitizer to watch.

Run by test_threads.py with the sanitizer's runtime preloaded: ``python operators.py LIBRARY [race]``. PyTorch itself
stays on one thread; only this project's code is instrumented.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

import afa_kernels
from afa_kernels import _native_module


def load(library: str):
    loader = importlib.machinery.ExtensionFileLoader("_native", library)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_native", library, loader=loader))
    loader.exec_module(module)
    return module


def everything(_: int) -> list[torch.Tensor]:
    """Every operator, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.rand(shape, generator=generator)
    height, width, radius = 9, 14, 2
    images, masks = random(2, 3, height, width), random(2, 5, height, width).requires_grad_()
    query, key = (random(2, 3, height * width, 8).requires_grad_() for _ in range(2))
    head = random(3).requires_grad_(), random(1).requires_grad_()
    labels = torch.randint(3, (2, height, width), generator=generator)
    results = [
        afa_kernels.par(images, masks, (1, 3), 3, backend="native"),
        afa_kernels.pamr(images, masks, (1,), 2, backend="native"),
        afa_kernels.par_weights(images, (1, 2), backend="native"),
        afa_kernels.attention_affinity_loss(query, key, *head, labels, radius, backend="native")[0],
    ]
    window = afa_kernels.window_affinity(query, key, *head, height, width, radius, backend="native")
    results += [
        window,
        afa_kernels.affinity_loss(window.detach(), labels, radius, backend="native")[0],
        afa_kernels.random_walk(window.detach(), masks, radius, backend="native"),
    ]
    for result in results:
        if result.requires_grad:
            result.square().sum().backward()
    return [result.detach() for result in results] + [masks.grad, query.grad, key.grad, head[0].grad]


def main(library: str, race: str = "") -> None:
    torch.set_num_threads(1)
    module, original = load(library), _native_module.native
    if race:
        ctypes.CDLL(library).afa_planted_race()
        return
    for name, loaded in list(sys.modules.items()):
        if name.startswith("afa_kernels") and getattr(loaded, "native", None) is original:
            loaded.native = module
    with mock.patch.object(torch, "get_num_threads", lambda: 4):
        alone = everything(0)
        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(everything, range(4)):
                assert all(torch.equal(got, want) for got, want in zip(results, alone))
    print("every operator ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
