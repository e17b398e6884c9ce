"""In which precision the networks compute."""

from __future__ import annotations

import contextlib

import torch

from .notices import notice


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 autocast as ``amp`` says: ``auto`` (on a GPU that computes in bfloat16), ``bf16``, ``off``."""
    if amp == "auto":
        enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        enabled = amp == "bf16"
    if enabled and device.type == "cpu" and not _computes_in_bfloat16():
        what = "this CPU has no instructions for bfloat16 (AVX512-BF16 or AMX)"
        notice("amp", f"{what}: amp bf16 is slower on it than off")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _computes_in_bfloat16() -> bool:
    """Whether this CPU does, as far as PyTorch tells: versions before `get_capabilities` and other machines than x86-64
    are believed to.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return has.get("architecture") != "x86_64" or bool(has.get("avx512_bf16") or has.get("amx_bf16"))
