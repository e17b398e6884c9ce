"""Argument checks shared by the operators: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FARTHEST = 1 << 20  # pixels that a tap may be away
MOST_STEPS = (1 << 31) - 1


def check_tensor(
    value: torch.Tensor,
    name: str,
    shape: Sequence[str | int],
    dtypes: Sequence[torch.dtype] = FLOATS,
    **sizes: int,
) -> None:
    """``value`` is a non-empty tensor of rank ``len(shape)``; entries of ``shape`` that are numbers, or names found
    in ``sizes``, must match.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {_layout(shape)}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {allowed}, got {value.dtype}")
    found = value.shape
    if len(found) != len(shape):
        raise ValueError(f"{name} must have shape {_layout(shape)}, got {tuple(found)}")
    for size, expected in zip(found, shape):
        wanted = sizes.get(expected) if isinstance(expected, str) else expected
        if wanted is not None and size != wanted:
            which = f" with {expected} = {wanted}" if isinstance(expected, str) else ""
            raise ValueError(f"{name} must have shape {_layout(shape)}{which}, got {tuple(found)}")
        if size == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(found)}")


def check_images(images: torch.Tensor, name: str) -> None:
    """Photographs [B, 3, H, W] in 0..1, or of other numbers of channels. What image files give says what to do with it:
    bytes, and channels last (three; so an image three pixels wide must have three channels).
    """
    if isinstance(images, torch.Tensor):
        size = images.shape
        last = len(size) in (3, 4) and size[-1] == 3 and size[-3] != 3
        hints: list[str] = []
        if last or (len(size) == 3 and size[0] == 3):
            order = ".permute(0, 3, 1, 2)" if last and len(size) == 4 else ".permute(2, 0, 1)" if last else ""
            hints.append(f"{name}{order}{'[None]' if len(size) == 3 else ''} has that shape")
        if images.dtype in INTEGERS:
            hints.append(f"{name} / 255 is in 0..1")
        if hints:
            kind = TypeError if images.dtype in INTEGERS else ValueError
            layout, shape = _layout(("B", 3, "H", "W")), tuple(size)
            raise kind(
                f"{name} must be {layout} of floating point in 0..1, got {shape} of {images.dtype}: {', '.join(hints)}"
            )
    check_tensor(images, name, ("B", "channels", "H", "W"))


def _layout(shape: Sequence[str | int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_same_device(reference: torch.Tensor, reference_name: str, **others: torch.Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}, got {value.device}"
            )


def check_int(value: int, name: str, minimum: int, maximum: int | None = None) -> int:
    if type(value) is int and minimum <= value and (maximum is None or value <= maximum):
        return value  # nearly always, and without the time that the rest takes
    if isinstance(value, bool) or not isinstance(value, int):
        try:
            if isinstance(value, (bool, float, str)):
                raise TypeError
            value = value.__index__()
        except (TypeError, AttributeError):
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def check_float(value: float, name: str, *, positive: bool = False) -> float:
    if type(value) is float and (0.0 if positive else -math.inf) < value < math.inf:
        return value
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        value = math.inf
    # math.isfinite cannot be traced where torch.compile takes the number for one that may change.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be a finite{' positive' if positive else ''} number, got {value}")
    return value


def check_dilations(dilations: Sequence[int]) -> list[int]:
    """Dilations in pixels, each at least 1 and at most `FARTHEST`, as a list."""
    if isinstance(dilations, (str, bytes)) or not hasattr(dilations, "__iter__"):
        raise TypeError(f"dilations must be a sequence of integers, got {dilations!r}")
    values = [check_int(value, "dilations", 1, FARTHEST) for value in dilations]
    if not values:
        raise ValueError("dilations must not be empty")
    return values


def check_class_mask(class_mask: torch.Tensor | None, masks: torch.Tensor, name: str = "masks") -> None:
    if class_mask is not None:
        check_tensor(class_mask, "class_mask", ("B", "C"), (torch.bool,), B=masks.shape[0], C=masks.shape[1])
        check_same_device(masks, name, class_mask=class_mask)


def check_window(affinity: torch.Tensor, radius: int) -> None:
    """``affinity`` is a window [B, (2r+1)^2, h, w] of this radius."""
    taps = (2 * radius + 1) ** 2
    check_tensor(affinity, "affinity", ("B", "taps", "h", "w"))
    if affinity.shape[1] != taps:
        raise ValueError(f"affinity must have {taps} channels, (2 * radius + 1)^2, got {affinity.shape[1]}")
