"""bfloat16 where it is asked for, and what is told of machines without it."""

from __future__ import annotations

import pytest
import torch

from afa_model.runtime.notices import forget_notices
from afa_model.runtime.precision import autocast


@pytest.mark.parametrize(
    ("has", "told"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_bfloat16_on_a_cpu_that_has_none_is_told_once(monkeypatch, capsys, has, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    forget_notices()
    cpu = torch.device("cpu")
    for amp in ("off", "auto"):
        with autocast(amp, cpu):
            assert not torch.is_autocast_enabled("cpu")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        with autocast("bf16", cpu):
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    assert capsys.readouterr().err.count("no instructions for bfloat16") == told
    forget_notices()
