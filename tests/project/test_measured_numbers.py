"""Numbers of the documents that no script writes there are those of benchmarks/results."""

from __future__ import annotations

import json
import re

import pytest
from support.common import ROOT


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def cells(document: str, first: str) -> list[str]:
    """Of the table's row that begins with ``first``, what comes after it."""
    rows = [line for line in (ROOT / "docs" / document).read_text().splitlines() if line.startswith(f"| {first} |")]
    assert len(rows) == 1, first
    return [cell.strip() for cell in rows[0].strip("|").split("|")[1:]]


def first_number(text: str) -> float:
    return float(re.search(r"[\d.]+", text)[0])


def test_label_maps_of_bfloat16_are_as_near_as_the_protocol_says():
    apart = [abs(miou["off"] - miou["bf16"]) for miou in results("bfloat16-cpu.json")["miou"].values()]
    (stated,) = cells("protocol.md", "mIoU on the validation pictures")
    assert first_number(stated) == round(max(apart), 2)


@pytest.mark.parametrize(
    "row, kind",
    [
        ("float16, the scale corrected so that their sum is kept", "half, kept sum"),
        ("3 bits of exponent, 13 of mantissa, sum kept", "3 + 13, kept sum"),
        ("16 bits of fixed point, sum kept", "fixed, kept sum"),
        ("the same, roundings handed on from tap to tap", "diffused, kept sum"),
    ],
)
def test_masks_of_16_bit_weights_deviate_as_the_table_says(row, kind):
    images = results("weight_formats.json")["deviation"].values()
    for stated, count in zip(cells("kernels.md", row), ("10", "20"), strict=True):
        found = [image[kind][count] for image in images]
        assert [f"{float(bound):.0e}" for bound in stated.split(" to ")] == [f"{min(found):.0e}", f"{max(found):.0e}"]
