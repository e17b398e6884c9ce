"""Drives CMakeLists.txt and records what was built, so that ``afa doctor`` can say why something was not.

AFA_CUDA=0          CPU kernels only              AFA_CUDA=1    fail rather than leave the CUDA kernels out
AFA_CUDA_ARCHS      CUDA architectures, as CMake takes them ("80;90"); default: the visible GPUs', else 7.5 to 12.1
AFA_NATIVE=0        no native module at all       CXX, CUDACXX  compilers
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import build_backend  # noqa: E402


def wheel_cuda() -> Path | None:
    """Root of the CUDA compiler wheels (nvidia/cu13) in this build environment, if they are complete."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        root = Path(folder) / "cu13"
        if (root / "bin" / "nvcc").exists() and (root / "nvvm" / "bin" / "cicc").exists():
            return root
    return None


def cuda_options() -> tuple[list[str], str | None, str]:
    """CMake options that build the CUDA kernels, for which architectures, by which compiler; or [], None, why not."""
    reason = build_backend.why_no_cuda()
    if reason:
        return [], None, reason
    nvcc, root = build_backend.system_nvcc(), wheel_cuda()
    if nvcc:
        name, options = nvcc, []
    elif root:
        nvcc, name = str(root / "bin" / "nvcc"), "the CUDA compiler wheels"
        # The wheels keep their libraries in lib, where the compiler's own profile looks in lib64.
        options = [f"-DAFA_CUDA_LIBRARY_DIR={root / 'lib'}", f"-DCMAKE_CUDA_FLAGS_INIT=-L{root / 'lib'}"]
        options += [f"-DCUDAToolkit_ROOT={root}"]
    else:
        oldest = build_backend.OLDEST_CUDA
        return [], None, f"no nvcc from CUDA {oldest} on the system and no CUDA compiler wheels for this platform"
    notes = [build_backend.driver_note(build_backend.compiler_version(nvcc))]
    architectures = own = os.environ.get("AFA_CUDA_ARCHS")
    later = ""
    if not architectures or architectures == "native":
        known, visible = build_backend.known_architectures(nvcc), build_backend.visible_architectures()
        architectures, note = build_backend.architectures(known, visible)
        own, later = (architectures, "") if visible else build_backend.front_ends(architectures)
        notes.append(note)
    said = "; ".join(filter(None, notes))
    options += ["-DAFA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={own}"]
    options += [f"-DAFA_CUDA_ASSEMBLED={later}", f"-DAFA_CUDA_ASSEMBLED_FROM={build_backend.SHARED_PTX}"]
    return options, architectures, f"{name} ({said})" if said else name


class CMakeBuild(build_ext):
    """Configure, build, install into the place setuptools names; leave the reason behind when something is
    missing.
    """

    def run(self) -> None:
        self.used_in_place = self.inplace or self.editable_mode  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        info = {"native": False, "native_reason": None, "cuda": False, "cuda_reason": None, "cuda_archs": None}
        info["sources"] = build_backend.sources_digest()
        # On Windows MinGW's g++ would link what Python there does not bring, and MSVC has no vector types.
        compilers, advice = ("c++", "g++", "clang++"), "g++"
        if sys.platform == "win32":
            compilers, advice = ("clang++",), "clang++"
        cxx = os.environ.get("CXX") or next(filter(shutil.which, compilers), None)
        if os.environ.get("AFA_NATIVE") == "0":
            info["native_reason"] = "AFA_NATIVE=0 was set when this was built"
        elif cxx is None or shutil.which(cxx) is None:
            info["native_reason"] = f"no C++ compiler was found when this was built (install {advice} or set CXX)"
        if info["native_reason"]:
            info["cuda_reason"] = info["native_reason"]
            print(f"afa: native module left out: {info['native_reason']}", file=sys.stderr)
        else:
            self.build_native(target, info, cxx)
        if os.environ.get("AFA_CUDA") == "1" and not info["cuda"]:
            raise SystemExit(f"afa: AFA_CUDA=1, but {info['cuda_reason']}")
        places = {target, ROOT / "afa_kernels"} if self.used_in_place else {target}
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            lines = [f"{key} = {value!r}" for key, value in info.items()]
            if not info["native"]:
                for stale in place.glob("_native.*"):
                    stale.unlink()
            (place / "_build_info.py").write_text('"""Written by setup.py."""\n' + "\n".join(lines) + "\n")

    def build_native(self, target: Path, info: dict, cxx: str) -> None:
        import pybind11

        common = [
            f"-DCMAKE_CXX_COMPILER={shutil.which(cxx)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        options, architectures, compiler = cuda_options()
        if options:
            try:
                print(f"afa: CUDA kernels by {compiler}", file=sys.stderr)
                self.cmake("cuda", common + options)
                info.update(native=True, cuda=True, cuda_reason=compiler, cuda_archs=architectures)
                return
            except subprocess.CalledProcessError as error:
                if os.environ.get("AFA_CUDA") == "1":
                    raise
                compiler = f"compiling with {compiler} failed ({error}); build with AFA_CUDA=1 to see it stop there"
                print(f"afa: CUDA kernels left out: {compiler}", file=sys.stderr)
        info["cuda_reason"] = compiler
        self.cmake("cpu", common)
        info["native"] = True

    def cmake(self, name: str, options: list[str]) -> None:
        folder = Path(self.build_temp).resolve() / name
        # A folder configured by another build environment points at compilers and headers that are gone.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(["cmake", str(ROOT), *generator, *options], cwd=folder, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", ".", "-j", jobs], cwd=folder, check=True)


# Optional: without a C++ compiler there is no file to install. A compiler that fails still stops the installation.
native = Extension("afa_kernels._native", sources=[], optional=True)
setup(ext_modules=[native], cmdclass={"build_ext": CMakeBuild}, license="MIT")
