"""Reads the weights of Vision Transformers from the files in circulation.

timm's own; DeiT's (under ``model``); DINO's (``teacher`` or ``student``, behind ``backbone.``; of both the teacher, the
average over training, is taken); CLIP's, whose visual part is (``visual.``); as ``.pth``, ``.bin`` or ``.safetensors``.
What timm knows of others' names (DINOv2, DINOv3, EVA, open_clip) it translates, and it resamples position embeddings of
another grid. Heads and what only pretraining uses are left out; all else has to fit.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from .weights import NESTED, check_finite, read_weights, under_prefix, weights_in

_PATCHES = "patch_embed.proj.weight"
_CLIP = ("conv1.weight", "positional_embedding")
_AVERAGES = ("teacher", "state_dict_ema", "model_ema")
_PLACES = (*_AVERAGES, *NESTED, "module", "student")
_HEADS = re.compile(r"(head|head_dist|dino_head|ibot_head|lm_head|attn_pool|fc_norm|mask_token|masked_embed)(\.|$)")


def load_vit_weights(model: nn.Module, path: str | Path, name: str) -> None:
    """Load a weight file into the timm model ``name`` without a head, strictly but for what is said above.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: it holds no weights, or those of another model: the error names what is missing, unexpected and of
            another shape.
    """
    content = read_weights(path)
    try:
        state = _translated(_one_network(weights_in(content, _PLACES), model), model)
    except ValueError as error:
        raise ValueError(f"pretrained: {path} does not hold the weights of {name}: {error}") from error
    wanted = model.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or not _HEADS.match(key)}
    wrong = [
        f"{what} ({len(names)}): {_listed(names)}"
        for what, names in (
            ("missing", [key for key in wanted if key not in state]),
            ("unexpected", [key for key in state if key not in wanted]),
            ("of another shape", _other_shapes(state, wanted)),
        )
        if names
    ]
    if wrong:
        raise ValueError(f"pretrained: {path} does not hold the weights of {name}: {'; '.join(wrong)}")
    model.load_state_dict(state)
    check_finite(model, path)


def _one_network(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The one network among named tensors, without what stands before its names (CLIP's: behind ``visual.``).

    Raises:
        ValueError: there are several.
    """
    averaged = {key: value for key, value in tensors.items() if key.removeprefix("module.").startswith("teacher.")}
    tensors = averaged or tensors
    patches = [key for key in tensors if key == _PATCHES or key.endswith(f".{_PATCHES}")]
    if not patches:
        visual = [key.removesuffix(_CLIP[0]) for key in tensors if re.search(rf"(^|\.){re.escape(_CLIP[0])}$", key)]
        prefix = next((prefix for prefix in visual if prefix + _CLIP[1] in tensors), None)
        if prefix is None:
            return dict(tensors)
        return {"visual." + key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return under_prefix(tensors, [_PATCHES, *(key for key in model.state_dict() if key != _PATCHES)])


def _translated(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """By timm's names, position embeddings on the model's grid: what timm does before it loads a file of its own.

    Raises:
        ValueError: the patches are of another size; timm would resample their weights, too.
    """
    ours = getattr(getattr(model.patch_embed, "proj", None), "weight", None)
    theirs = next((state[key] for key in (_PATCHES, "visual.conv1.weight") if key in state), None)
    if ours is not None and theirs is not None and theirs.ndim == 4 and theirs.shape[2:] != ours.shape[2:]:
        raise ValueError(f"its patches are {theirs.shape[2]} x {theirs.shape[3]} pixels, not {tuple(ours.shape[2:])}")
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with contextlib.suppress(RuntimeError, AssertionError, LookupError):  # of another model: what differs is listed
        state = dict(translate(dict(state), model)) if translate is not None else state
    known = model.state_dict().keys()
    for key in list(state):  # layer scale by the names of DeiT III's own files
        scale = re.sub(r"gamma_([12])$", r"ls\1.gamma", key)
        if key not in known and scale in known:
            state[scale] = state.pop(key)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _other_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} {list(value.shape)} in place of {list(wanted[key].shape)}"
        for key, value in state.items()
        if key in wanted and value.shape != wanted[key].shape
    ]


def _listed(names: Collection[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(list(names)[:most]) + (f" and {more} more" if more > 0 else "")
