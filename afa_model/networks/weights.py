"""Reads MiT weights from every layout in circulation and renames them to this project's (the public) names.

Public (mit_b*.pth)  patch_embed1.proj, block1.0.attn.{q,kv,proj,sr,norm}, block1.0.mlp.{fc1,fc2}, norm1, head
Hugging Face         encoder.patch_embeddings.0, encoder.block.0.0.attention.self.{query,key,value,sr}, ...
                     and, in memory since transformers 5, stages.0.blocks.0.attention.{q,k,v,o}_proj, ...
AFA, SegFormer       the public names behind ``encoder.`` or ``backbone.``, beside a decoder

They lie at the top of the file, or in ``state_dict``, ``model_state_dict``, ``model`` or ``net`` of it, and any wrapper
(``module.``, ``model.``, ``model.backbone.``) may stand before their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..runtime.tensor_files import read_tensors

_NESTED = ("state_dict", "model_state_dict", "model", "net")  # where files keep weights beside other things
_HF_WRAPPERS = re.compile(r"^(?:module\.|model\.|net\.|_orig_mod\.)+(?=segformer\.|encoder\.|stages\.)")
_HF_STAGE = re.compile(
    r"^(?:segformer\.)?(?:encoder\.(?P<kind>patch_embeddings|block|layer_norm)\.(?P<old>\d)"
    r"|stages\.(?P<new>\d)\.(?P<kind5>patch_embeddings|blocks|layer_norm))\."
)
_STAGE_NAMES = {"patch_embeddings": "patch_embed", "block": "block", "blocks": "block", "layer_norm": "norm"}
_HF_RENAMES = (
    (re.compile(r"attention\.(self\.query|q_proj)\."), "attn.q."),
    (re.compile(r"attention\.(self\.sr|sequence_reduction\.sequence_reduction)\."), "attn.sr."),
    (re.compile(r"attention\.(self|sequence_reduction)\.layer_norm\."), "attn.norm."),
    (re.compile(r"attention\.(output\.dense|o_proj)\."), "attn.proj."),
    (re.compile(r"(layer_norm_1|layernorm_before)\."), "norm1."),
    (re.compile(r"(layer_norm_2|layernorm_after)\."), "norm2."),
    (re.compile(r"layer_norm\."), "norm."),
    (re.compile(r"mlp\.dense([12])\."), r"mlp.fc\1."),
)
_HF_KEY = re.compile(r"attention\.(?:self\.key|k_proj)\.")
_HF_VALUE = re.compile(r"attention\.(?:self\.value|v_proj)\.")


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' Segformer names -> public names. Its separate key and value are stacked into ``kv``."""
    out: dict[str, Tensor] = {}
    values = {_HF_VALUE.sub("attn.kv.", name): state[name] for name in state if _HF_VALUE.search(name)}
    for name, value in state.items():
        stage = _HF_STAGE.match(name)
        if name.startswith("classifier."):
            out["head." + name.removeprefix("classifier.")] = value
        if stage is None or _HF_VALUE.search(name):
            continue  # the decode head of a segmentation checkpoint; values join their keys below
        public = f"{_STAGE_NAMES[stage['kind'] or stage['kind5']]}{int(stage['old'] or stage['new']) + 1}."
        rest = name[stage.end() :]
        if _HF_KEY.search(name):
            both = [value, values[_HF_KEY.sub("attn.kv.", name)]]
            out[public + _HF_KEY.sub("attn.kv.", rest)] = torch.cat(both)
            continue
        for pattern, ours in _HF_RENAMES:
            rest, found = pattern.subn(ours, rest)
            if found:
                break
        out[public + rest] = value
    return out


def weights_in(content: Any) -> dict[str, Tensor]:
    """The named tensors in what a weight file holds.

    Raises:
        ValueError: there are none.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
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
    plain = {_HF_WRAPPERS.sub("", name): value for name, value in state.items()}
    if any(_HF_STAGE.match(name) for name in plain):
        state = _from_hugging_face(plain)
    else:
        state = under_prefix(state, [name for name in model.state_dict() if not name.startswith("head.")])
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
