"""Every emulated CUDA entry point at odd shapes, in a process whose memory accesses a sanitizer checks.

Run by test_cuda_emulator.py with the sanitizer's runtime preloaded. NumPy alone: each array is its own allocation,
so an access one element past it is seen. ``python under_sanitizers.py address [fault]``. The numbers are other tests'.
"""

from __future__ import annotations

import sys

import numpy as np

from build import load

SHAPES = [(1, 1, 1, 1), (2, 2, 1, 40), (1, 3, 37, 1), (3, 5, 2, 3), (1, 9, 19, 33), (2, 4, 16, 32)]
DILATIONS = [[1], [1, 2, 4, 8, 12, 24], [40, 3]]
DEVICES = {"resident": (4, 227 * 1024), "streaming": (1, 1000)}


def view(array: np.ndarray) -> tuple:
    code = {"float32": 0, "float16": 1, "uint16": 2}[array.dtype.name]
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, code, array.shape, strides


def floats(*shape: int, kind: str = "float32") -> np.ndarray:
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "uint16" else values.astype(kind)


def run_par(native, shape: tuple, dilations: list[int], kind: str, transpose: bool, half: bool, masked: bool) -> None:
    batch, channels, height, width = shape
    images, (masks, out) = floats(batch, 3, height, width, kind=kind), (floats(*shape, kind=kind) for _ in range(2))
    present = np.arange(batch * channels, dtype=np.uint8) % 2
    factors = [0.3, 0.3, 0.01] if masked else []
    for num_iter in (0, 1, 2, 4):
        size = native.par_cuda_workspace(view(images), view(masks), dilations, num_iter, transpose, half, 0)
        scratch = np.full(max(size, 1), 255, np.uint8)
        mask = present.ctypes.data if masked else 0
        options = mask, num_iter, transpose, half, scratch.ctypes.data, 0, 0
        native.par_cuda(view(images), view(masks), view(out), dilations, factors, *options)
    weights = floats(batch, 8 * len(dilations), height, width, kind=kind)
    native.par_weights_cuda(view(images), view(weights), dilations, factors, 0, 0)


def run_diffusion(native, shape: tuple, kind: str, transpose: bool) -> None:
    batch, channels, height, width = shape
    offsets = [0, 0, 1, -2, -3, 1, 0, 5, -40, 7, 3, 60, 2, 0, 0, 8]
    for zero_border in (False, True):
        for num_iter in (0, 1, 3):
            weights, masks, out = floats(batch, 8, height, width, kind=kind), floats(*shape), floats(*shape)
            size = native.diffuse_cuda_workspace(view(weights), view(masks), offsets, num_iter, transpose, 0)
            scratch = np.full(max(size, 1), 255, np.uint8)
            options = 0, num_iter, zero_border, transpose, scratch.ctypes.data, 0, 0
            native.diffuse_cuda(view(weights), view(masks), view(out), offsets, *options)


def main(sanitizer: str, fault: str | None = None) -> None:
    emulator = load(sanitizer)
    if fault is not None:
        out = np.zeros(64, np.float32)
        print(f"{fault}: {emulator.fault(fault, out.ctypes.data) or 'unnoticed'}")
        return
    calls = 0
    for order, device in enumerate(DEVICES.values()):
        emulator.set_order(order)
        emulator.set_device(*device)
        for shape in SHAPES:
            for transpose in (False, True):
                for kind in ("float32", "float16", "uint16"):
                    run_diffusion(emulator.native, shape, kind, transpose)
                    dilations = DILATIONS[calls % 3]
                    run_par(emulator.native, shape, dilations, kind, transpose, bool(calls % 2), bool(calls // 2 % 2))
                    calls += 1
    print(f"clean after {len(emulator.launches())} launches")


if __name__ == "__main__":
    main(*sys.argv[1:])
