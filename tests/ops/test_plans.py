"""Which plan PAR takes on a GPU: the choice, how it is asked for, and the page's table."""

from __future__ import annotations

import math

import pytest
from support.common import ROOT, available

from afa_kernels.ops.diffusion import plans

needs_native = pytest.mark.skipif("native" not in available("par"), reason="no native backend here")


# --- the choice -------------------------------------------------------------------------------------------------------


@needs_native
def test_what_fits_on_which_card():
    """The bounds of residence follow from shared memory and multiprocessors: 352 x 352 on an H100."""
    fits = {card: [size for size in range(32, 480, 32) if resident(size, card) < math.inf] for card in plans.CARDS}
    assert max(fits["H100"]) == max(fits["H200"]) == 352
    assert max(fits["H100"]) > max(fits["A100"]) > max(fits["RTX 4090"]) > max(fits["T4"]) >= 64
    assert all(sizes == list(range(32, max(sizes) + 1, 32)) for sizes in fits.values())


def resident(size: int, card: str) -> float:
    return plans.par_plan((1, 3, size, size), card=card).resident_us


@needs_native
def test_the_cheaper_is_taken_and_streaming_only_if_clearly():
    seen = set()
    for card in plans.CARDS:
        for size in (*plans.SIZES, (1, 3, 64, 64), (4, 7, 100, 120), (1, 40, 96, 96)):
            plan = plans.par_plan(size, card=card)
            assert plan.streaming_us > 0 and plan.resident_us > 0
            assert plan.name == ("streaming" if plan.streaming_us < 0.9 * plan.resident_us else "resident")
            seen.add((plan.name, plan.resident_us < math.inf, plan.streaming_us < plan.resident_us))
    assert ("streaming", True, True) in seen and ("resident", True, True) in seen and ("resident", True, False) in seen


@needs_native
def test_costs_follow_what_is_moved():
    h100 = plans.CARDS["H100"]
    one, two = (plans.par_plan((batch, 3, 320, 320)) for batch in (4, 8))
    assert one.resident_us * 2 == pytest.approx(two.resident_us), "images of this size are walked through one at a time"
    launch = 4.0
    few, many = (plans.par_plan((1, channels, 320, 320)).streaming_us - launch for channels in (21, 42))
    assert many / few == pytest.approx(2, rel=0.15), "neighbours decide"
    small = plans.par_plan((2, 3, 256, 256), card=h100._replace(l2_bytes=1 << 20))
    assert small.streaming_us > 1.1 * plans.par_plan((2, 3, 256, 256)).streaming_us, "weights that do not stay in L2"
    half = plans.par_plan((1, 3, 1024, 2048), half_weights=True)
    assert half.streaming_us < 0.8 * plans.par_plan((1, 3, 1024, 2048)).streaming_us
    assert plans.par_plan((1, 3, 400, 400)).resident_us == math.inf
    assert plans.par_plan((1, 3, 400, 400), half_weights=True).resident_us < math.inf
    slice_of_it = plans.par_plan((1, 3, 1024, 2048), card=h100._replace(multiprocessors=66))
    assert slice_of_it.streaming_us - launch == pytest.approx(
        2 * (plans.par_plan((1, 3, 1024, 2048)).streaming_us - launch)
    )


@needs_native
def test_an_unknown_card_takes_the_row_below_it():
    newer = plans.CARDS["H100"]._replace(architecture=120)
    assert plans.par_plan((1, 3, 160, 160), card=newer) == plans.par_plan((1, 3, 160, 160))
    with pytest.raises(ValueError, match="card must be one of H200, H100, A100, RTX 4090, T4, or a Card, got 'V100'"):
        plans.par_plan((1, 3, 160, 160), card="V100")


@needs_native
def test_the_table_of_the_page_is_what_is_chosen():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in plans.table().splitlines()]
    assert lines[0] == ["masks", *plans.CARDS] and len(lines) == 2 + len(plans.SIZES)
    for size, (name, *cells) in zip(plans.SIZES, lines[2:]):
        assert name == "x".join(map(str, size))
        for card, cell in zip(plans.CARDS, cells):
            plan = plans.par_plan(size, card=card)
            assert cell.startswith(f"{plan.name}: ") and cell.endswith(f"/ {plan.streaming_us:.1f}")
            assert ("does not fit" in cell) == (plan.resident_us == math.inf)
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert "<!-- plans -->" in page and "counted, not measured" in page
    for card in plans.CARDS:  # an H100's row is that of an H200
        assert all(plans.par_plan(size, card=card).measured == card.startswith("H") for size in plans.SIZES)


# --- what AFA_PLAN says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", ["auto", "resident", "streaming", "stream", "", None])
def test_what_is_asked_for(monkeypatch, wish):
    monkeypatch.delenv("AFA_PLAN", raising=False)
    if wish is not None:
        monkeypatch.setenv("AFA_PLAN", wish)
    assert plans.asked_for() == {"stream": "streaming", "": "auto", None: "auto"}.get(wish, wish)
