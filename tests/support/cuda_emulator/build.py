"""Builds the native module with the CUDA sources compiled for the emulator: CMake's list of files, the host compiler.

``python -m tests.support.cuda_emulator.build`` or `load` from a test; objects are kept in ``build/cuda_emulator`` by
content.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
THREAD_SANITIZER = HERE.parent / "thread_sanitizer" / "openmp.cpp"
# As a GPU's compiler would have it: products and the sums after them are one rounding wherever the source allows it.
CONTRACTED = ["-O2", "-ffp-contract=fast", "-mfma"]
# Without the checks of undefined behaviour whose harm the address sanitizer sees: a third of the compile time.
COVERED = "null,nonnull-attribute,returns-nonnull-attribute,object-size,vptr,return,unreachable"
ADDRESS = ["-g1", "-fsanitize=address,undefined", f"-fno-sanitize={COVERED}", "-fno-omit-frame-pointer"]
# A call for each access, not code of its own: half the compile time, for half as much again of what it runs.
ADDRESS += ["-fno-sanitize-recover=undefined", "--param", "asan-instrumentation-with-call-threshold=0"]
THREAD = ["-g1", "-fsanitize=thread"]
BINDINGS = "bindings.cpp"  # all of them in one, for pybind11's headers take longer than what is bound
# Parsed once for each set of flags: that takes longer than most files' own code.
COMMON = {
    ".cu": ["common/cuda_common.cuh", "common/arena.h", "algorithm"],
    ".cpp": ["common/simd.h", "common/threads.h", "common/rows.h", "algorithm", "cmath", "vector"],
}
# A call less at every use of a thread's own variables, in processes that load little else.
FAST_LOCALS = "-ftls-model=initial-exec"


def _flags_of(file: Path, kind: str) -> list[str]:
    """Optimised and sanitized is only what a test is about: the emulated sources, or for "thread" the CPU's kernels."""
    if kind == "host" and file.name == BINDINGS:  # the kernels do not run, so what is between Python and them is fast
        return ["-O2"]
    if kind == "host" or (kind == "thread" and (file.suffix == ".cu" or file.parent == HERE)):
        kind = kinds()[-1]  # does not run: as it is there already
    if kind == "contracted" and file.suffix == ".cu":
        return CONTRACTED
    if kind == "races" and (file.suffix == ".cu" or file.parent == HERE):
        return ["-O1", "-DAFA_EMULATOR_RACES", FAST_LOCALS, *(THREAD if file.suffix == ".cu" else [])]
    if file.suffix == ".cu" or file.parent == HERE:
        level = "-O0" if kind == "address" and file.suffix == ".cu" else "-O1"
        return [level, *([*ADDRESS, FAST_LOCALS] if kind == "address" else [])]
    if kind == "thread" and file.name != BINDINGS:
        return ["-O1", "-fopenmp", *THREAD]
    return ["-O0"]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def sources(*lists: str) -> list[Path]:
    """Files of CMakeLists.txt's source lists, such as ``AFA_CUDA_SOURCES``."""
    text = (ROOT / "CMakeLists.txt").read_text()
    return [ROOT / name for key in lists for name in re.search(rf"set\({key}\s+([^)]*)\)", text)[1].split()]


def _flags() -> list[str]:
    import pybind11

    python = sysconfig.get_path("include")
    # Half-precision arrays are read 16 bytes at a time, as on a device.
    flags = "-std=c++17 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -DAFA_WITH_CUDA=1"
    quiet = "-Wall -Wno-unknown-pragmas -Wno-psabi"
    folders = [HERE / "include", HERE, CSRC]
    libraries = [python, pybind11.get_include()]
    return [
        *flags.split(),
        *quiet.split(),
        *(f"-I{path}" for path in folders),
        *(f"-isystem{path}" for path in libraries),
    ]


@functools.cache
def _headers_digest() -> bytes:
    headers = sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.h*")) + sorted(CSRC.rglob("*.cuh"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in headers)).digest()


def build(kind: str = "plain") -> Path:
    """Compile what changed and link; returns the shared library. ``kind``: "plain"; "contracted", products fused into
    sums as a GPU's compiler does; "host", to time what calls them (`Emulator.set_dry`); or sanitized: "address",
    "thread" (the CPU's kernels), "races" (between CUDA threads).
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    files = sources("AFA_CUDA_SOURCES", "AFA_CPU_KERNELS", "AFA_CPU_SOURCES")
    files += [HERE / "emulator.cpp", HERE / "switches.cpp", HERE / "faults.cu"]
    files += [THREAD_SANITIZER] if kind == "thread" else []
    folder = ROOT / "build" / "cuda_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side build it once
        return _build(cxx, folder, [_bindings(folder), *files], kind)


def _bindings(folder: Path) -> Path:
    """The file that includes all of the bindings, and changes where one of them does."""
    parts = sources("AFA_BINDINGS")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    lines = [f"// {digest}", *(f'#include "{path.relative_to(CSRC).as_posix()}"' for path in parts)]
    (folder / BINDINGS).write_text("\n".join(lines) + "\n")
    return folder / BINDINGS


def _compiled(cxx: str, file: Path, flags: list[str], target: Path, language: str = "c++") -> Path:
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([cxx, *flags, "-x", language, "-c", str(file), "-o", str(unfinished)], check=True)
        unfinished.rename(target)
    return target


def _key(cxx: str, flags: list[str], content: bytes) -> str:
    return hashlib.sha256(_headers_digest() + content + " ".join([cxx, *flags]).encode()).hexdigest()[:16]


def precompiled(cxx: str, folder: Path, suffix: str, flags: list[str]) -> Path:
    """A header that includes what most sources of this suffix do, with its compiled form beside it."""
    text = "".join(f"#include <{name}>\n" for name in COMMON[suffix])
    header = folder / f"{_key(cxx, flags, text.encode())}{suffix}.h"
    if not header.exists():
        header.write_text(text)
    _compiled(cxx, header, flags, Path(f"{header}.gch"), "c++-header")
    return header


def _build(cxx: str, folder: Path, files: list[Path], kind: str) -> Path:
    common, kernels = _flags(), sources("AFA_CUDA_SOURCES", "AFA_CPU_KERNELS")
    flags_of = {file: [*common, *_flags_of(file, kind)] for file in files}
    sets = {(file.suffix, *flags_of[file]): file for file in kernels}

    def compile_one(file: Path) -> Path:
        flags = flags_of[file]
        # Operators' files share names: csrc/affinity/backward.cpp, csrc/random_walk/backward.cpp.
        target = folder / f"{'.'.join(file.relative_to(ROOT).parts)}.{_key(cxx, flags, file.read_bytes())}.o"
        parsed = headers.get((file.suffix, *flags)) if file in kernels else None
        return _compiled(cxx, file, [*flags, *(["-include", str(parsed)] if parsed else [])], target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda key: precompiled(cxx, folder, key[0], flags_of[sets[key]]), sets)
        headers = dict(zip(sets, made))
        objects = list(pool.map(compile_one, files))
    link = {"address": ADDRESS, "thread": THREAD, "races": THREAD}.get(kind, [])
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / key / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([cxx, *link, "-shared", *map(str, objects), "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


class Emulator:
    """The emulated module, ``native``, and the emulator's switches."""

    def __init__(self, library: Path) -> None:
        # A name for each library: pybind11 gives the module that it has already made of a name.
        name = f"afa_emulator_{library.parent.name}._native"
        loader = importlib.machinery.ExtensionFileLoader(name, str(library))
        spec = importlib.util.spec_from_file_location(name, library, loader=loader)
        self.native: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.native)
        self._switches = ctypes.CDLL(str(library))
        self._switches.afa_emulator_fault.restype = ctypes.c_char_p

    def set_order(self, order: int) -> None:
        """Order of threads and blocks: 0 ascending, 1 descending, above that shuffled by this seed."""
        self._switches.afa_emulator_set_order(order)

    def set_device(
        self,
        multiprocessors: int = 4,
        shared_bytes: int = 227 * 1024,
        compiled: int = 90,
        room: int = 2**62,
        pause: int = 0,
        l2_bytes: int = 0,
    ) -> None:
        """See Settings in emulator.h; what is not named is as at the start."""
        sizes = ctypes.c_int64(room), pause, ctypes.c_int64(l2_bytes)
        self._switches.afa_emulator_set_device(multiprocessors, shared_bytes, compiled, *sizes)

    def set_blocks(self, first: int = 0, count: int = 2**62) -> None:
        """Run only these blocks of every launch that is not cooperative; ``first`` < 0 counts from the last one."""
        self._switches.afa_emulator_set_blocks(ctypes.c_int64(first), ctypes.c_int64(count))

    def set_dry(self, dry: bool) -> None:
        """Launches and memsets are counted and do nothing: what a call costs then is the host's part."""
        self._switches.afa_emulator_set_dry(int(dry))

    def counts(self) -> tuple[int, int]:
        """Kernels launched and memsets made since the last call, dry or not."""
        launches, memsets = ctypes.c_int64(), ctypes.c_int64()
        self._switches.afa_emulator_counts(ctypes.byref(launches), ctypes.byref(memsets))
        return launches.value, memsets.value

    def launches(self) -> list[str]:
        """Kernels launched since the last call, as ``cooperative 4 x 1024 x 512`` or ``8 x 128 x 0``: blocks, threads,
        bytes of shared memory.
        """
        self._switches.afa_emulator_launches.restype = ctypes.c_char_p
        return self._switches.afa_emulator_launches().decode().splitlines()

    def fault(self, name: str, out: int) -> str:
        """Run the faulty kernel ``name`` of faults.cu on 64 floats at an address; what the emulator complained of."""
        return self._switches.afa_emulator_fault(name.encode(), ctypes.c_void_p(out)).decode()


@functools.cache
def _load(kind: str) -> Emulator:
    return Emulator(build(kind))


def load(kind: str | None = None) -> Emulator:
    """By default that of `kinds` which is nearest to a GPU."""
    return _load(kind or kinds()[-1])


def kinds() -> list[str]:
    """The builds whose numbers are checked: products fused into sums, as a GPU's compiler does, where this CPU can.
    With AFA_EMULATE=all (``make test-slow``) also without: what may be fused must be free to be left.
    """
    cpu = Path("/proc/cpuinfo")
    fuses = cpu.exists() and " fma " in cpu.read_text()
    if not fuses:
        return ["plain"]
    return ["plain", "contracted"] if os.environ.get("AFA_EMULATE") == "all" else ["contracted"]


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
