"""The CUDA toolkit's programs that tests call, where they are."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import build_backend  # noqa: E402

NVCC: str | None = build_backend.system_nvcc()


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    candidates = [shutil.which("cuobjdump"), str(Path(NVCC).with_name("cuobjdump")) if NVCC else None]
    try:
        import triton

        candidates.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    except ImportError:
        pass
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)
