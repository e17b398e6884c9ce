"""Both plans of the diffusion, emulated: chosen, asked for, and refused."""

from __future__ import annotations

import math

import pytest
import torch
from support.common import relative_error
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated

from afa_kernels import diffuse, par
from afa_kernels.core import self_check
from afa_kernels.ops.diffusion import plans

pytestmark = ON_THE_EMULATOR
SIX = (1, 2, 4, 8, 12, 24)


def test_both_plans_give_the_same_and_the_choice_is_the_model(emulator, rng, monkeypatch):
    """A device on which one size stays on chip and another, that would fit as well, is streamed."""
    device = plans.Card(4, 227 << 10, 50 << 20, 75)
    sizes = {"resident": (1, 3, 20, 33), "streaming": (1, 24, 24, 40)}
    taps = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if (dy, dx) != (0, 0)]
    for plan, size in sizes.items():
        found = plans.par_plan(size, SIX, 3, card=device)
        assert found.name == plan and found.resident_us < math.inf
        images, masks = torch.rand(1, 3, *size[2:], generator=rng), torch.rand(size, generator=rng)
        weights = torch.rand(1, 8, *size[2:], generator=rng) / 8
        calls = {
            "par": lambda backend=None: par(images, masks, SIX, 3, backend=backend),  # noqa: B023
            "diffuse": lambda backend=None: diffuse(weights, masks, taps, 3, backend=backend),  # noqa: B023
        }
        for name, call in calls.items():
            want = call("reference")
            for wish in ("auto", "resident", "streaming", "stream"):
                monkeypatch.setenv("AFA_PLAN", wish)
                with emulated(emulator):
                    emulator.set_device(*device[:2], l2_bytes=device.l2_bytes)
                    emulator.launches()
                    got = call()
                    launches = emulator.launches()
                assert relative_error(got, want) < 1e-5
                taken = "resident" if any(launch.startswith("cooperative") for launch in launches) else "streaming"
                if wish != "auto" or name == "par":
                    assert taken == (plan if wish == "auto" else plans.asked_for())


def test_what_cannot_be_had_is_an_error_that_names_the_variable(emulator, rng, monkeypatch):
    images, masks = torch.rand(1, 3, 9, 9, generator=rng), torch.rand(1, 2, 9, 9, generator=rng)
    weights = torch.rand(1, 1, 9, 9, generator=rng)
    with emulated(emulator):
        monkeypatch.setenv("AFA_PLAN", "fast")
        with pytest.raises(ValueError, match="AFA_PLAN must be auto, resident or streaming, got 'fast'"):
            par(images, masks, (1,), 2)
        with pytest.raises(ValueError, match="AFA_PLAN must be"):
            diffuse(weights, masks, [(0, 0)], 2)
        monkeypatch.setenv("AFA_PLAN", "resident")
        emulator.set_device(1, 1000)
        with pytest.raises(RuntimeError, match="par: AFA_PLAN=resident, but these weights do not fit"):
            par(images, masks, (1,), 2)
        with pytest.raises(RuntimeError, match="diffuse: AFA_PLAN=resident, but these weights do not fit"):
            diffuse(weights, masks, [(0, 0)], 2)
        diffuse(weights, masks, [(0, 0)], 1)  # a single iteration has one plan


def test_a_plan_that_is_asked_for_is_not_asked_of_the_self_check(emulator, monkeypatch):
    """Whose sizes it need not fit: the backend would be held for broken, and every call would fail."""
    cpu = torch.device("cpu")
    monkeypatch.setenv("AFA_PLAN", "resident")
    with emulated(emulator):
        emulator.set_device(1, 1000)
        for operator in ("par", "diffuse", "random_walk"):
            row = self_check.check(operator, "native", cpu, torch.float32, torch.float32, False)
            self_check.forget(operator, "native", cpu)
            assert row.ok, row
        assert plans.asked_for() == "resident"
