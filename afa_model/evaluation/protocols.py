"""The published ways to evaluate. docs/protocol.md says what is known of them and what each number was measured by."""

from __future__ import annotations

from typing import Any

# What of `EvaluateSettings` is not said is as the protocol has it.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # while training: the photograph at its own size, once
    "training": {
        "long_side": 0,
        "scales": (1.0,),
        "flips": False,
        "affinity_of": "plain",
        "walk_score": 0.35,
    },
    # of a trained model
    "test": {
        "long_side": 512,
        "scales": (1.0, 0.5, 0.75),
        "flips": True,
        "affinity_of": "largest",
        "walk_score": None,
    },
}
