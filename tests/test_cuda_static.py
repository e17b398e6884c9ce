"""What the CUDA compiler says of every kernel: spills, and the occupancy and wide loads its note states."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code
import pytest
from cuda_emulator.build import CSRC, ROOT, sources
from cuda_tools import NVCC, disassembler

# Turing, Ampere, Hopper, Blackwell: warps and shared memory differ, 65536 registers a multiprocessor they all have.
THREADS = {"75": 1024, "80": 2048, "90": 2048, "120": 1536}
REGISTERS = 65536

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this system (PATH, CUDA_HOME or CUDACXX)")


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture."""

    name: str  # with its template arguments: diffuse_step<float, 4, 7>
    arch: str
    registers: int
    stack: int
    spills: int
    static_shared: int


def compile_all(source: Path, folder: Path) -> str:
    """Machine code for every architecture, kept by content; returns the assembler's report."""
    headers = b"".join(path.read_bytes() for path in sorted(CSRC.glob("*.*h")))
    key = hashlib.sha256(headers + source.read_bytes() + NVCC.encode()).hexdigest()[:16]
    binary, report = (folder / f"{source.stem}.{key}.{kind}" for kind in ("fatbin", "txt"))
    if not report.exists():
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in THREADS]
        command = [NVCC, "-std=c++17", *targets, "-Xptxas", "-v", "-fatbin", str(source), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        report.write_text(run.stdout + run.stderr)
    return report.read_text()


def code_of_all(folder: Path, arch: str) -> dict[str, str]:
    """The machine code of every kernel."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit's, or Triton")
    found: dict[str, str] = {}
    for source in sources("AFA_CUDA_SOURCES"):
        newest = max(folder.glob(f"{source.stem}.*.fatbin"), key=lambda path: path.stat().st_mtime)
        code = machine_code.functions(tool, newest, arch)
        found |= dict(zip(demangle(list(code)), code.values()))
    return found


def demangle(names: list[str]) -> list[str]:
    """``void afa::kernel<float, 4>(afa::Args)`` without its namespace, result and arguments."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"^void |\((int|bool|afa::\w+)\)|(?<![\w:])afa::", "", line) for line in plain.splitlines()]
    return [re.sub(r"\((?!anonymous).*", "", line).replace("(anonymous namespace)::", "") for line in short]


def parse(report: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, report, re.DOTALL)
    kernels = []
    for name, (_, arch, stack, stores, loads, registers, rest) in zip(demangle([row[0] for row in found]), found):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        kernels.append(Kernel(name, arch, int(registers), int(stack), spills, int(shared[1]) if shared else 0))
    return kernels


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = ROOT / "build" / "cuda_static"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[Kernel]:
    files = sources("AFA_CUDA_SOURCES")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [
            kernel for report in pool.map(lambda file: compile_all(file, folder), files) for kernel in parse(report)
        ]


def notes() -> str:
    """The header comments of all CUDA sources, joined to one line each."""
    texts = [path.read_text() for path in sorted(CSRC.glob("*.cu*"))]
    return "\n".join(re.sub(r"\s*\n//\s*", " ", text.split("#include")[0].split("#pragma")[0]) for text in texts)


def test_every_kernel_compiles_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    assert {name.split("<")[0] for name in names} >= {
        "diffuse_resident",
        "diffuse_step",
        "diffuse_adjoint",
        "par_weights_kernel",
        "pair_kernel",
        "product_kernel",
        "window_loss_kernel",
        "walk_weights_kernel",
    }
    assert {(kernel.name, kernel.arch) for kernel in kernels} == {(name, arch) for name in names for arch in THREADS}


def test_nothing_is_spilled(kernels):
    assert [kernel for kernel in kernels if kernel.spills or kernel.stack] == []


def test_shared_memory_comes_from_the_arena_alone(kernels):
    assert [kernel for kernel in kernels if kernel.static_shared] == []


def test_occupancy_is_what_the_notes_state(kernels):
    stated = {
        name: (int(threads), int(blocks)) for name, threads, blocks in re.findall(r"(\w+) (\d+) x (\d+)", notes())
    }
    missed = []
    for kernel in kernels:
        name = kernel.name.split("<")[0]
        assert name in stated, f"{name}: state 'Occupancy: {name} THREADS x BLOCKS' in its source's header note"
        threads, blocks = stated[name]
        # Registers are handed out to whole warps, 8 to a thread at a time.
        reached = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
        if min(reached, THREADS[kernel.arch] // threads) < blocks:
            missed.append((kernel, reached))
    assert missed == []


def test_a_spill_would_be_seen(tmp_path):
    """The gate itself: 1024 threads leave 64 registers, and this kernel wants over a hundred."""
    source = tmp_path / "greedy.cu"
    sums = "\n".join(f"  float v{i} = at[{i}] * at[{i + 200}];" for i in range(100))
    uses = "\n".join(f"  at[{i}] = v{i} + v{99 - i};" for i in range(100))
    source.write_text(f"__global__ void __launch_bounds__(1024, 1) greedy(volatile float* at) {{\n{sums}\n{uses}\n}}\n")
    kernels = parse(compile_all(source, tmp_path))
    assert {kernel.arch for kernel in kernels} == set(THREADS) and all(kernel.spills for kernel in kernels)


def test_streaming_kernels_load_16_bytes_at_a_time(kernels, folder):
    stated = re.findall(r"Wide loads: (.*?)\.(?:\s|$)", notes())
    wanted = [pattern.removesuffix(">") + ">" for line in stated for pattern in re.split(r">, (?=\w+<)", line)]
    code = code_of_all(folder, "90")
    assert [name for name, body in code.items() if re.search(r"\b(LDL|STL)\b", body)] == [], "local memory"
    wide = {name: len(re.findall(r"\bLDG\.E\S*\.128", body)) for name, body in code.items()}
    assert wanted
    for pattern in wanted:
        matching = [name for name in wide if fnmatch.fnmatchcase(name, pattern)]
        assert matching, f"no kernel is called {pattern}; there are {sorted(wide)}"
        assert all(wide[name] > 0 for name in matching), {name: wide[name] for name in matching}


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_product_is_fused_in_front_of_an_exponential(kernels, folder, arch):
    """exp(a - max) where max is one of the rounded a: fused into the difference, a would not be rounded as max is."""
    code = code_of_all(folder, arch)
    before = {name: machine_code.before_exponentials(body) for name, body in code.items()}
    refine = [name for name in code if "par_weights_kernel" in name or "ParWeights" in name]
    assert len(refine) >= 6 and all(len(before[name]) >= 16 for name in refine)
    assert any(before[name] for name in code if name.startswith("pair_kernel"))
    assert {name: found for name in before if (found := [line for line in before[name] if "FFMA" in line])} == {}
    assert all({line.split()[0] for line in found} <= {"FADD"} for found in before.values()), before


def test_a_fused_product_would_be_seen(tmp_path):
    """The gate itself, on the softmax as one would write it."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit's, or Triton")
    source = tmp_path / "softmax.cu"
    source.write_text(
        "__global__ void softmax(const float* in, float* out) {\n"
        "  const int i = threadIdx.x;\n"
        "  const float highest = fmaxf(in[0] * 0.3f, in[1] * 0.3f);\n"
        "  out[i] = __expf(PRODUCT(in[i], 0.3f) - highest);\n}\n"
    )
    for product, seen in (("(a) * (b)", "FFMA"), ("__fmul_rn(a, b)", "FADD")):
        text = source.read_text()
        one = tmp_path / f"{seen}.cu"
        one.write_text(f"#define PRODUCT(a, b) {product}\n{text}")
        compile_all(one, tmp_path)
        (code,) = machine_code.functions(tool, next(tmp_path.glob(f"{seen}.*.fatbin")), "90").values()
        assert [line.split()[0] for line in machine_code.before_exponentials(code)] == [seen]
