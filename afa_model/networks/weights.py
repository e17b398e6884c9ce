"""Reads MiT weights from every layout in circulation and renames them to this project's (the public) names.

Public (mit_b*.pth)  patch_embed1.proj, block1.0.attn.{q,kv,proj,sr,norm}, block1.0.mlp.{fc1,fc2}, norm1, head
Hugging Face         encoder.patch_embeddings.0, encoder.block.0.0.attention.self.{query,key,value,sr}, ...
                     and, in memory since transformers 5, stages.0.blocks.0.attention.{q,k,v,o}_proj, ...
AFA, SegFormer       the public names behind ``encoder.`` or ``backbone.``, beside a decoder
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

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


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Any known layout of MiT weights (also inside ``state_dict``, ``model``, ``module.``) -> public names.

    The ImageNet head is kept where the model has one of that shape; what belongs to no backbone is dropped.
    """
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(_HF_STAGE.match(name) for name in state):
        state = _from_hugging_face(state)
    else:
        for prefix in ("encoder.", "backbone."):
            if f"{prefix}patch_embed1.proj.weight" in state:
                state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    head = getattr(model.head, "weight", None)
    if head is None or getattr(state.get("head.weight"), "shape", None) != head.shape:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    return dict(state)


def load_mit_weights(model: nn.Module, path: str | Path) -> None:
    """Load a weight file (``.pth``, ``.bin``, ``.safetensors``) of any known layout into a MiT, strictly.

    Raises FileNotFoundError, or ValueError naming what is missing, unexpected or of another shape: a file of
    another variant never loads half.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained: no weight file at {path}")
    state = checkpoint_filter_fn(load_state_dict(str(path), use_ema=False), model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"pretrained: {path} does not hold the weights of this MiT: {error}") from error
