"""Which plan the CUDA kernels of the diffusion, and of PAR, take: weights resident on chip, or streamed.

The choice is made by the kernels (csrc/diffusion/plan.h), at every call, from what the two would take on this card. The
environment variable ``AFA_PLAN`` forces one: ``resident``, ``streaming`` (or ``stream``), ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...core.native_module import native, run_planned

WISHES = ("auto", "resident", "streaming", "stream")


class Card(NamedTuple):
    """What of a GPU the choice depends on.

    ``shared_bytes`` are those that one block may have, ``architecture`` 90 for 9.0.
    """

    multiprocessors: int
    shared_bytes: int
    l2_bytes: int
    architecture: int


# From NVIDIA's data sheets and its table of compute capabilities.
CARDS = {
    "H200": Card(132, 227 << 10, 60 << 20, 90),
    "H100": Card(132, 227 << 10, 50 << 20, 90),
    "A100": Card(108, 163 << 10, 40 << 20, 80),
    "RTX 4090": Card(128, 99 << 10, 72 << 20, 89),
    "T4": Card(40, 64 << 10, 4 << 20, 75),
}


class Plan(NamedTuple):
    """What is chosen, ``resident`` or ``streaming``, and microseconds of one iteration of the whole batch by both.

    ``resident_us`` is infinite where the weights do not fit on the chip. ``measured``: whether the constants of the
    card were measured; if not, they were counted.
    """

    name: str
    resident_us: float
    streaming_us: float
    measured: bool


def asked_for() -> str:
    """What ``AFA_PLAN`` says, ``auto`` where it says nothing.

    Raises:
        ValueError: it says something else than ``auto``, ``resident`` or ``streaming``.
    """
    wish = os.environ.get("AFA_PLAN") or "auto"
    if wish not in WISHES:
        raise ValueError(f"AFA_PLAN must be auto, resident or streaming, got {wish!r}")
    return "streaming" if wish == "stream" else wish


def run(
    operator: str, device: torch.device, size: Callable[[], int], kernel: Callable[[tuple[int, int]], None]
) -> None:
    """`run_planned`, with what ``AFA_PLAN`` asks for.

    Raises:
        ValueError: ``AFA_PLAN`` names no plan.
        RuntimeError: it is ``resident``, and the weights do not fit on the chip.
    """
    wish = asked_for()
    try:
        run_planned(device, size, kernel)
    except RuntimeError as error:
        if wish == "resident" and "not supported" in str(error):
            raise RuntimeError(
                f"{operator}: AFA_PLAN=resident, but these weights do not fit on the chip (not supported)"
            ) from error
        raise


def device_card(device: torch.device | int = 0) -> Card:
    """The numbers of a GPU that is here."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 48 << 10)
    return Card(found.multi_processor_count, shared, found.L2_cache_size, 10 * found.major + found.minor)


def par_plan(
    shape: Sequence[int],
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    num_iter: int = 10,
    half_weights: bool = False,
    card: Card | str = "H100",
) -> Plan:
    """The plan that PAR takes for masks of a shape, if ``AFA_PLAN`` leaves the choice.

    Args:
        shape: of the masks, [B, C, H, W].
        dilations: as for `par`.
        num_iter: as for `par`.
        half_weights: whether weights are kept in half precision, as for bfloat16 masks.
        card: a name of `CARDS`, or the numbers of another GPU, such as `device_card` gives them.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(f"card must be one of {', '.join(CARDS)}, or a Card, got {card!r}")
        card = CARDS[card]
    batch, channels, height, width = shape
    ring = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    taps = [value * dilation for dilation in dilations for tap in ring for value in tap]
    strides = (channels * height * width, height * width, width, 1)
    masks = (0, 0, (batch, channels, height, width), strides)
    resident, *costs, _, measured = native.diffusion_plan(masks, taps, num_iter, 3, half_weights, True, tuple(card))
    return Plan("resident" if resident else "streaming", *costs, measured)


SIZES = (
    (1, 3, 160, 160),
    (2, 3, 256, 256),
    (8, 3, 256, 256),
    (8, 3, 320, 320),
    (1, 21, 64, 64),
    (1, 21, 320, 320),
    (8, 21, 320, 320),
    (1, 21, 512, 512),
    (1, 3, 1024, 2048),
)


def table() -> str:
    """Markdown: what is chosen for usual sizes on each of `CARDS`, with the microseconds of an iteration."""
    lines = ["| masks | " + " | ".join(CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    for size in SIZES:
        cells = []
        for card in CARDS:
            plan = par_plan(size, card=card)
            other = "does not fit" if plan.resident_us == float("inf") else f"{plan.resident_us:.1f}"
            cells.append(f"{plan.name}: {other} / {plan.streaming_us:.1f}")
        lines.append("| " + " | ".join(["x".join(map(str, size)), *cells]) + " |")
    return "\n".join(lines)
