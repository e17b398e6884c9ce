"""Settings that had another name in an earlier version: checkpoints keep the configuration they were made by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# old key -> new key; None: there is one value for all, and no setting any more
RENAMED = {
    "step.high_score": "labels.high_score",
    "step.low_score": "labels.low_score",
    "step.radius": "labels.radius",
    "step.cam_scales": "labels.cam_scales",
    "step.par_dilations": "labels.dilations",
    "step.par_iters": "labels.num_iter",
    "step.walk_power": "labels.walk_power",
    "step.walk_eps": "labels.walk_eps",
    "step.image_mean": None,
    "step.image_std": None,
    "eval.bkg_score": "labels.bkg_score",
    "eval.par_dilations": "eval.dilations",
    "eval.par_iterations": "eval.num_iter",
    "data.without_class": "data.allow_empty",
}


_MAPPINGS = {"data.mask_values"}  # settings that are mappings themselves


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in _MAPPINGS:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of any version -> of this one."""
    nested: dict[str, Any] = {}
    flat = flatten(values)
    if "eval.long_side" in flat and "eval.protocol" not in flat:  # before there were protocols
        flat["eval.protocol"] = "test"
        flat["eval.long_side"] = flat["eval.long_side"] or 0  # None said "as they are"
    if "data.without_class" in flat:
        flat["data.without_class"] = flat["data.without_class"] == "background"
    for old, value in flat.items():
        key = RENAMED.get(old, old)
        if key is None:
            continue
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested
