"""How often the host launches something in a call, forward and backward, and the benchmark that counts it."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from support.common import relative_error
from support.cuda_emulator import build
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated

from afa_kernels import affinity_from_maps, affinity_loss, attention_affinity_loss, diffuse, par, random_walk

pytestmark = ON_THE_EMULATOR


# --- launches ---------------------------------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.float32, head: torch.dtype = torch.float32) -> tuple[list, torch.Tensor]:
    """Queries, keys, the head, and labels that are every sixteenth of a larger image's."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(2, 3, 99, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(count, generator=generator).to(head).requires_grad_() for count in (3, 1))
    return [query, key, weight, bias], torch.randint(3, (2, 144, 176), generator=generator)[:, ::16, ::16]


def counted(emulator, call) -> tuple[int, int]:
    emulator.counts()
    call()
    return emulator.counts()


@pytest.mark.parametrize("label", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_a_loss_is_one_launch_and_its_backward_two(emulator, label, head):
    """Whatever the labels and the head are: nothing is converted, checked or put together beside the kernels."""
    leaves, labels = inputs(torch.bfloat16, head)
    labels = labels.to(label)
    with emulated(emulator):
        losses = []
        for recompute in (True, False):  # the second launch is the product; the first makes what it needs, either way
            call = partial(attention_affinity_loss, *leaves, labels, 3, recompute=recompute)
            assert counted(emulator, lambda call=call: losses.append(call()[0])) == (1, 1)
            assert counted(emulator, lambda: torch.autograd.grad(losses.pop(), leaves)) == (2, 0)
        window = torch.rand(2, 49, 9, 11, requires_grad=True)
        assert counted(emulator, lambda: losses.append(affinity_loss(window, labels, 3)[0])) == (1, 1)
        assert counted(emulator, lambda: torch.autograd.grad(losses[0], window)) == (1, 0)
        maps = torch.rand(2, 3, 99, 99, requires_grad=True)
        dense = affinity_from_maps(maps, *leaves[2:], 9, 11, 3)
        assert counted(emulator, lambda: dense.sum().backward()) == (2, 0)


def test_par_and_the_walk_are_one_launch(emulator):
    images, masks, affinity = torch.rand(1, 3, 20, 24), torch.rand(1, 5, 20, 24), torch.rand(1, 49, 8, 9)
    cams = torch.rand(1, 4, 8, 9)
    with emulated(emulator):
        assert counted(emulator, lambda: par(images, masks)) == (1, 0)
        for steps in (1, 2, 5):
            assert counted(emulator, partial(random_walk, affinity, cams, 3, num_steps=steps)) == (1, 0)


@pytest.mark.parametrize(("taps", "extra"), [(448, 0), (449, 2)])
def test_taps_that_fit_in_a_parameter_need_no_launch(rng, emulator, taps, extra):
    weights, masks = torch.rand(1, taps, 5, 16, generator=rng), torch.rand(1, 2, 5, 16, generator=rng)
    offsets = torch.randint(-9, 9, (taps, 2), generator=rng)
    with emulated(emulator):
        assert counted(emulator, lambda: diffuse(weights, masks, offsets, 2)) == (2 + extra, 0)


def test_a_side_beyond_16_bits_has_its_taps_in_memory(rng, emulator):
    """Offsets of a parameter are of 16 bits: farther ones would turn around."""
    width = 33_000
    weights, masks = torch.rand(1, 2, 1, width, generator=rng), torch.rand(1, 1, 1, width, generator=rng)
    want = diffuse(weights, masks, [(0, 32_900), (0, -1)], 1, "zero", backend="reference")
    with emulated(emulator):
        got = diffuse(weights, masks, [(0, 32_900), (0, -1)], 1, "zero")
    assert relative_error(got, want) < 1e-6


# --- the walk in one launch and by way of its weights -----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9, 25])
@pytest.mark.parametrize("steps", [1, 3])
def test_both_ways_of_the_walk_agree(rng, emulator, monkeypatch, channels, steps):
    """Several threads share a channel's window, or a thread has up to three channels, or walks over them."""
    affinity, cams = torch.rand(2, 81, 7, 11, generator=rng), torch.rand(2, channels, 7, 11, generator=rng)
    kept = torch.rand(2, channels, generator=rng) > 0.4
    for class_mask in (None, kept):
        want = random_walk(affinity, cams, 4, num_steps=steps, class_mask=class_mask, backend="reference")
        for plan in ("resident", "streaming"):
            monkeypatch.setenv("AFA_PLAN", plan)
            results = []
            for order in (0, 1):
                with emulated(emulator, order):
                    emulator.set_device(multiprocessors=8)
                    emulator.launches()
                    results.append(random_walk(affinity, cams, 4, num_steps=steps, class_mask=class_mask))
                    launches = emulator.launches()
                    assert (len(launches) == 1) == (plan == "resident")
                    assert launches[0].startswith("cooperative") == (plan == "resident" and steps > 1)
            assert torch.equal(*results) and relative_error(results[0], want) < 1e-5


def test_what_lies_outside_plays_no_part_in_one_launch(emulator):
    """Weights there are 0, but 0 times infinity would not be; and NaN stays in the windows that hold it."""
    affinity, cams = torch.rand(1, 81, 6, 40), torch.rand(1, 2, 6, 40)
    cams[0, 0, 0, 0], cams[0, 1, 5, 39] = float("inf"), float("nan")
    want = random_walk(affinity, cams, 4, backend="reference")
    with emulated(emulator):
        got = random_walk(affinity, cams, 4)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert relative_error(got[got.isfinite()], want[want.isfinite()]) < 1e-5


def test_a_walk_that_does_not_fit_goes_by_way_of_memory(rng, emulator, monkeypatch):
    affinity, cams = torch.rand(1, 49, 20, 33, generator=rng), torch.rand(1, 3, 20, 33, generator=rng)
    with emulated(emulator):
        emulator.set_device(1)
        monkeypatch.setenv("AFA_PLAN", "resident")
        with pytest.raises(RuntimeError, match="not supported"):
            random_walk(affinity, cams, 3, num_steps=2)
        assert counted(emulator, lambda: random_walk(affinity, cams, 3)) == (1, 0)  # one step has no barrier
        monkeypatch.delenv("AFA_PLAN")
        assert counted(emulator, lambda: random_walk(affinity, cams, 3, num_steps=2))[0] > 1


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_counts_and_times_without_a_gpu(emulator, monkeypatch, tmp_path):
    root = build.ROOT
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    bench = importlib.import_module("bench_host")
    monkeypatch.setattr(build, "load", lambda kind: emulator)
    result = bench.measure("stub", calls=1, rounds=2)
    rows = {row["case"]: row for row in result["host"]}
    counts = {name: (row["launches"], row["memsets"]) for name, row in rows.items()}
    assert counts["par"] == counts["random_walk"] == (1, 0) and counts["loss"] == (1, 1)
    assert counts["loss + backward"] == (3, 1) and counts["nothing, by the dispatcher"] == (0, 0)
    # The three results, the scratch memory, and what is kept, or that nothing is.
    assert rows["loss"]["operators"] == 5
    assert all(row["us"] >= row["least_us"] > 0 for row in rows.values())
    assert "stub" in result["launcher"] and "no measurement of a GPU" in bench.title(result)
    (line,) = [line for line in importlib.import_module("on_gpu_report").host(result) if line.startswith("| par |")]
    assert line.startswith("| par | 1 | 0 | 2 |")
