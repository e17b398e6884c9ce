"""Reads MiT weights from every layout in circulation (`layouts.py`), and says what files hold instead.

They lie at the top of the file, or in ``state_dict``, ``model_state_dict``, ``model`` or ``net`` of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..runtime.tensor_files import read_tensors
from .layouts import find_mit

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where files keep weights beside other things


def weights_in(content: Any, places: Sequence[str] = NESTED) -> dict[str, Tensor]:
    """The named tensors in what a weight file holds, at its top or in the first of ``places`` that is there, and so on
    inward.

    Raises:
        ValueError: there are none.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in places if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not found:
        listed = ", ".join(map(repr, list(content)[:5])) or "nothing"
        raise ValueError(f"holds no tensors by name, but {listed}")
    return found


def under_prefix(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The part of ``state`` that has most of the names ``wanted``, without what stands before them; all of it where
    none has the first of them.

    Raises:
        ValueError: two parts have as many of them (a teacher's and a student's).
    """
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
    counts = {prefix: sum(prefix + name in state for name in wanted) for prefix in prefixes}
    best = [prefix for prefix in prefixes if counts[prefix] == max(counts.values())]
    if len(best) > 1:
        raise ValueError(f"holds several networks of this kind ({', '.join(best)}): keep one of them")
    prefix = best[0] if best else ""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Any known layout of MiT weights -> public names.

    The ImageNet head is kept where the model has one of that shape; what belongs to no backbone is dropped.

    Raises:
        ValueError: there are no weights, or those of several networks.
    """
    state = weights_in(state)
    found = find_mit(state)
    state = state if found is None else found.state
    head = getattr(model.head, "weight", None)
    if head is None or getattr(state.get("head.weight"), "shape", None) != head.shape:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    return dict(state)


def read_weights(path: str | Path) -> Any:
    """What a file of pretrained weights (``.pth``, ``.bin``, ``.safetensors``) holds. Code in it is never run.

    Raises FileNotFoundError, or ValueError saying what the file is instead.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"pretrained: no weight file at {path}")
    try:
        return read_tensors(path, "pretrained:")
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def not_finite(model: nn.Module) -> str:
    """The names of parameters with NaN or infinity among them, as those of a run that diverged; "" of a sound model."""
    wrong = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Raises ValueError naming the weights that are not finite, after a file of them was loaded."""
    wrong = not_finite(model)
    if wrong:
        raise ValueError(f"pretrained: {path} holds NaN or infinite weights: {wrong}")


def load_mit_weights(model: nn.Module, path: str | Path) -> None:
    """Load a weight file (``.pth``, ``.bin``, ``.safetensors``) of any known layout into a MiT, strictly.

    Raises FileNotFoundError, or ValueError naming what is missing, unexpected or of another shape: a file of
    another variant never loads half.
    """
    content = read_weights(path)
    try:
        model.load_state_dict(checkpoint_filter_fn(content, model))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"pretrained: {path} does not hold the weights of this MiT: {error}") from error
    check_finite(model, path)
