"""The machine code of the installed module, kernel by kernel: spills, the occupancy and wide loads its note states, and
what stands in front of exponentials.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support import machine_code
from support.cuda_emulator.build import CSRC
from support.cuda_tools import NVCC, build_backend, disassembler

import afa_kernels
from afa_kernels.core import native_module

# Threads of a multiprocessor by architecture: Turing, Ampere, Ada, Hopper, Blackwell. 65536 registers they all have.
THREADS = {"75": 1024, "80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}
REGISTERS = 65536
TOOL = disassembler()

pytestmark = [
    pytest.mark.skipif(TOOL is None, reason="no cuobjdump: install the CUDA toolkit's, or Triton"),
    pytest.mark.skipif(
        native_module.native is None or not native_module.native.cuda, reason="built without the CUDA kernels"
    ),
]


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture."""

    name: str  # with its template arguments: diffuse_step<float, 4, 7>
    arch: str
    registers: int
    stack: int  # and local memory: where spills go
    static_shared: int


def demangle(names: list[str]) -> list[str]:
    """``void afa::kernel<float, 4>(afa::Args)`` without its namespace, result and arguments."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"^void |\((int|bool|afa::\w+)\)|(?<![\w:])afa::", "", line) for line in plain.splitlines()]
    return [re.sub(r"\((?!anonymous).*", "", line).replace("(anonymous namespace)::", "") for line in short]


def resources(binary: Path) -> list[Kernel]:
    """Of every kernel and architecture in a binary."""
    command = [TOOL, "--dump-resource-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = []
    for arch, part in re.findall(r"Fatbin elf code:.*?arch = sm_(\d+)(.*?)(?=Fatbin|\Z)", report, re.DOTALL):
        found += [(arch, *row) for row in re.findall(pattern, part)]
    names = demangle([row[1] for row in found])
    return [
        Kernel(name, arch, int(registers), int(stack) + int(local), int(shared))
        for name, (arch, _, registers, stack, shared, local) in zip(names, found)
    ]


@pytest.fixture(scope="module")
def module() -> Path:
    if afa_kernels.build_info()["sources"] != build_backend.sources_digest():
        pytest.fail("csrc has changed since the module was built: pip install -e .")
    return Path(native_module.native.__file__)


@pytest.fixture(scope="module")
def kernels(module: Path) -> list[Kernel]:
    return resources(module)


@functools.cache
def code_of(module: Path, arch: str) -> dict[str, str]:
    """The machine code of every kernel, by its name."""
    code = machine_code.functions(TOOL, module, arch)
    return dict(zip(demangle(list(code)), code.values()))


def has(kernels: list[Kernel], arch: str) -> None:
    if all(kernel.arch != arch for kernel in kernels):
        pytest.skip(f"the module was built without {arch}")


def notes() -> str:
    """The header comments of all CUDA sources, joined to one line each."""
    texts = [path.read_text() for path in sorted(CSRC.rglob("*.cu*"))]
    return "\n".join(re.sub(r"\s*\n//\s*", " ", text.split("#include")[0].split("#pragma")[0]) for text in texts)


def test_every_kernel_is_there_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    assert {name.split("<")[0] for name in names} >= {
        "diffuse_resident",
        "diffuse_step",
        "diffuse_adjoint",
        "par_weights_kernel",
        "pair_kernel",
        "kept_gradient_kernel",
        "product_kernel",
        "window_loss_kernel",
        "walk_weights_kernel",
        "path_window_kernel",
        "path_gather_kernel",
        "feature_affinity_kernel",
        "feature_gradient_kernel",
        "sinkhorn_sum_kernel",
        "exact_kernel",
        "gaussian_kernel",
        "pcm_kernel",
    }
    built = set(re.findall(r"\d+", afa_kernels.build_info()["cuda_archs"]))
    archs = {kernel.arch for kernel in kernels}
    assert archs and archs <= built
    assert {(kernel.name, kernel.arch) for kernel in kernels} == {(name, arch) for name in names for arch in archs}


def test_nothing_is_spilled(kernels):
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_shared_memory_comes_from_the_arena_alone(kernels):
    """Some architectures keep a part of every block's for themselves: a kernel without arrays has it too."""
    own = {kernel.arch: kernel.static_shared for kernel in kernels if kernel.name == "copy_masks"}
    assert [kernel for kernel in kernels if kernel.static_shared > own[kernel.arch]] == []


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


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this system (PATH, CUDA_HOME or CUDACXX)")
def test_a_spill_would_be_seen(tmp_path):
    """The gate itself: 1024 threads leave 64 registers, and this kernel wants over a hundred."""
    sums = "\n".join(f"  float v{i} = at[{i}] * at[{i + 200}];" for i in range(100))
    uses = "\n".join(f"  at[{i}] = v{i} + v{99 - i};" for i in range(100))
    text = f"__global__ void __launch_bounds__(1024, 1) greedy(volatile float* at) {{\n{sums}\n{uses}\n}}\n"
    (kernel,) = resources(compiled(tmp_path, "greedy", text))
    assert kernel.name == "greedy" and kernel.stack > 0


def compiled(folder: Path, name: str, text: str) -> Path:
    source, binary = folder / f"{name}.cu", folder / f"{name}.fatbin"
    source.write_text(text)
    command = [NVCC, "-std=c++17", "-gencode=arch=compute_90,code=sm_90", "-fatbin", str(source), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True)
    return binary


def test_streaming_kernels_load_16_bytes_at_a_time(module, kernels):
    has(kernels, "90")
    stated = re.findall(r"Wide loads: (.*?)\.(?:\s|$)", notes())
    wanted = [pattern for line in stated for pattern in re.split(r", (?![^<>]*>)", line)]
    code = code_of(module, "90")
    assert [name for name, body in code.items() if re.search(r"\b(LDL|STL)\b", body)] == [], "local memory"
    wide = {name: len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128", body)) for name, body in code.items()}
    assert wanted
    for pattern in wanted:
        matching = [name for name in wide if fnmatch.fnmatchcase(name, pattern)]
        assert matching, f"no kernel is called {pattern}; there are {sorted(wide)}"
        assert all(wide[name] > 0 for name in matching), {name: wide[name] for name in matching}


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_product_is_fused_in_front_of_an_exponential(module, kernels, arch):
    """exp(a - max) where max is one of the rounded a: fused into the difference, a would not be rounded as max is."""
    has(kernels, arch)
    # The bilateral filters' and those of features are of distances: nothing is taken off them.
    distances = "exact_", "gaussian_", "feature_"
    code = {name: body for name, body in code_of(module, arch).items() if not name.startswith(distances)}
    before = {name: machine_code.before_exponentials(body) for name, body in code.items()}
    refine = [name for name in code if "par_weights_kernel" in name or "ParWeights" in name]
    assert len(refine) >= 6 and all(len(before[name]) >= 16 for name in refine)
    assert any(before[name] for name in code if name.startswith("pair_kernel"))
    assert {name: found for name in before if (found := [line for line in before[name] if "FFMA" in line])} == {}
    assert all({line.split()[0] for line in found} <= {"FADD"} for found in before.values()), before


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_exact_filter_sums_on_tensor_cores(module, kernels, arch):
    """And its exponentials are the hardware's, without what a denormal result would cost."""
    has(kernels, arch)
    code = {name: body for name, body in code_of(module, arch).items() if name.startswith("exact_kernel")}
    assert len(code) == 4
    for name, body in code.items():
        assert (len(re.findall(r"HMMA\.16816\.F32", body)) >= 6) == name.endswith("true>"), name
        assert len(re.findall(r"MUFU\.EX2 ", body)) >= 2
        assert not re.search(r"@!?P\d+ FMUL (R\d+), \1, \1 ", body), name  # the square of what was halved


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this system (PATH, CUDA_HOME or CUDACXX)")
@pytest.mark.parametrize(("product", "seen"), [("(a) * (b)", "FFMA"), ("__fmul_rn(a, b)", "FADD")])
def test_a_fused_product_would_be_seen(tmp_path, product, seen):
    """The gate itself, on the softmax as one would write it."""
    text = (
        f"#define PRODUCT(a, b) {product}\n"
        "__global__ void softmax(const float* in, float* out) {\n"
        "  const float highest = fmaxf(in[0] * 0.3f, in[1] * 0.3f);\n"
        "  out[threadIdx.x] = __expf(PRODUCT(in[threadIdx.x], 0.3f) - highest);\n}\n"
    )
    (code,) = machine_code.functions(TOOL, compiled(tmp_path, "softmax", text)).values()
    assert [line.split()[0] for line in machine_code.before_exponentials(code)] == [seen]
