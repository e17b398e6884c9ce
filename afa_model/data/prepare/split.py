"""Which photographs are kept for validation."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence


def validation_share(
    labels: Mapping[str, Sequence[str]], share: float, seed: int, placed: Mapping[str, bool]
) -> set[str]:
    """Of each class about ``share`` of its photographs, at least one of two or more, and never its last one.

    The rarest class chooses first; which photographs of it, a hash of seed and name says, so that the same are chosen
    wherever it runs.

    Args:
        labels: names of the classes of each photograph.
        placed: photographs that have their place, and whether that is in validation; they keep it.
    """
    if share == 0:
        return set()
    chosen = {name for name, in_validation in placed.items() if in_validation and name in labels}
    of_class: dict[str, list[str]] = defaultdict(list)
    for name in sorted(labels, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        for label in labels[name] or ("",):  # those of no class are a class here
            of_class[label].append(name)
    left = Counter({label: sum(name not in chosen for name in names) for label, names in of_class.items()})
    for _, names in sorted(of_class.items(), key=lambda item: (len(item[1]), item[0])):
        wanted = min(max(math.floor(share * len(names) + 0.5), 1), len(names) - 1)
        missing = wanted - sum(name in chosen for name in names)
        for name in names:
            own = labels[name] or ("",)
            if missing > 0 and name not in chosen and name not in placed and all(left[label] > 1 for label in own):
                chosen.add(name)
                left.subtract(own)
                missing -= 1
    return chosen
