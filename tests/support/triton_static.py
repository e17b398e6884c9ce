"""Compiles every Triton kernel for a GPU that need not be there: python -m support.triton_static CAPABILITY [--all]

Triton's interpreter, which runs the kernels on the CPU, takes Python that its compiler does not. Here the operators
launch as on a GPU of this compute capability (80, 90, ...), down to its machine code, but nothing runs. One line of
JSON for each kernel: name, shared memory in bytes, registers, stack, what stands in front of exponentials.
--all: also the third dtype and the smallest sizes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import afa_kernels
from afa_kernels.core import backends
from support.cuda_tools import disassembler
from support.every_operator import everything, smallest
from support.machine_code import before_exponentials, functions


class NoDriver:
    """What a launch asks a driver for, up to the launch itself."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead(capability: int) -> list[tuple[str, object]]:
    """From here on every launch compiles and does no more; the kernels gather in the list."""
    driver.set_active(NoDriver(capability))
    launch, seen, compiled = jit.JITFunction.run, set(), []

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            compiled.append((self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = run
    for predicates in backends._registry.values():
        if "triton" in predicates:
            predicates["triton"] = lambda device, *tensors: None
    return compiled


def as_trained(dtype: torch.dtype) -> None:
    """The operators at a training step's numbers of heads, channels, taps and radius."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(shape).to(dtype).requires_grad_()

    side, heads, radius = 16, 8, 8
    query, key, head = leaf(1, heads, side**2, 64), leaf(1, heads, side**2, 64), (leaf(heads), leaf(1))
    labels = torch.randint(3, (1, side, side))
    maps, window, cams = leaf(1, heads, side**2, side**2), leaf(1, 289, side, side), leaf(1, 21, side, side)
    images, masks, features = torch.rand(1, 3, 32, 32), leaf(1, 21, 32, 32), leaf(1, 192, side, side)
    for result in (
        afa_kernels.attention_affinity_loss(query, key, *head, labels, radius)[0],
        afa_kernels.window_affinity(query, key, *head, side, side, radius),
        afa_kernels.affinity_from_maps(maps, *head, side, side, radius),
        afa_kernels.affinity_loss(window, labels, radius)[0],
        afa_kernels.random_walk(window, cams, radius),
        afa_kernels.path_affinity(cams[:, :1], 5),
        *(afa_kernels.feature_affinity(features, radius, kind) for kind in ("cos", "exp_l1", "relu_dot")),
        afa_kernels.pcm(cams, features),
        afa_kernels.sinkhorn(window, radius, symmetric=True),
        afa_kernels.par(images, masks),
        afa_kernels.pamr(images, masks),
        afa_kernels.bilateral_filter(images, masks, 15, 50),
        afa_kernels.bilateral_filter(images, masks, None, 3),
    ):
        result.float().sum().backward()


def resources(kernel, tool: str | None) -> dict[str, object]:
    """Registers, stack and exponentials' sources of a kernel, as far as there is a tool to read them."""
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        listings = functions(tool, file.name).values() if "ex2." in kernel.asm["ptx"] else []
        before = [line for body in listings for line in before_exponentials(body)]
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack) + int(local), "before_exponentials": sorted(set(before))}


def main(capability: int, everything_else: bool) -> None:
    compiled = compile_instead(capability)
    with afa_kernels.use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            as_trained(dtype)
        of_training = len(compiled)
        if everything_else:
            smallest()
            everything(0, torch.float16)
    tool = disassembler()
    for index, (name, kernel) in enumerate(compiled):
        used = resources(kernel, tool) if index < of_training else {}
        print(json.dumps({"name": name, "shared": kernel.metadata.shared, **used}))


if __name__ == "__main__":
    print(f"Triton {triton.__version__}", file=sys.stderr)
    main(int(sys.argv[1]), "--all" in sys.argv)
