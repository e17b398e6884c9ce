"""The names that MiT weights have in the files in circulation, read and written.

mit          patch_embed1.proj, block1.0.attn.{q,kv,proj,sr,norm}, block1.0.mlp.{fc1,fc2}, norm1, head: the public
             mit_b*.pth, SegFormer, AFA, and this project
huggingface  encoder.patch_embeddings.0.proj, encoder.block.0.0.attention.self.{query,key,value}, ...: nvidia/mit-b*
mmseg        layers.0.0.projection, layers.0.1.0.attn.attn.in_proj_weight, layers.0.1.0.ffn.layers.{0,1,4}, layers.0.2
transformers stages.0.blocks.0.attention.{q,k,v,o}_proj, ...: what transformers 5 holds in memory (read only)

In all of them any wrapper's name (``module.``, ``backbone.``, ``segformer.``) may stand before. Layouts differ in which
of query, key and value lie in one tensor; between reading and writing each lies alone (``attn.k.``, ``attn.v.``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_QUERY, _KEY, _VALUE = "attn.q.", "attn.k.", "attn.v."


@dataclass(frozen=True)
class Layout:
    """One way to name the weights.

    Attributes:
        title: what people call it.
        stages: beginnings of names by kind of part, with ``{i}`` (stage from 0), ``{n}`` (from 1), ``{j}`` (block).
        parts: what follows, by kind -> what it is here; several, where their tensors lie one below the other.
        head: the ImageNet classifier's, if it is kept.
        convolved: parts whose matrices are kept as 1x1 convolutions.
        wrapper: what stands before all names in files of this layout.
    """

    title: str
    stages: Mapping[str, str]
    parts: Mapping[str, Mapping[str, tuple[str, ...]]]
    head: str | None = None
    convolved: tuple[str, ...] = ()
    wrapper: str = ""

    @property
    def first(self) -> str:
        """A name that all weights of this layout have."""
        theirs = next(name for name, ours in self.parts["embed"].items() if ours == ("proj.",))
        return self.stages["embed"].format(i=0, n=1) + theirs + "weight"

    @cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        """What the beginnings of names look like, by kind."""
        digits = {"{i}": r"(?P<i>\d)", "{n}": r"(?P<n>\d)", "{j}": r"(?P<j>\d+)"}
        found = {}
        for kind, beginning in self.stages.items():
            text = re.escape(beginning).replace(r"\{", "{").replace(r"\}", "}")
            for mark, digit in digits.items():
                text = text.replace(mark, digit)
            found[kind] = re.compile(text)
        return found

    def begin(self, name: str) -> tuple[str, re.Match[str]] | None:
        """Which kind of part a name is of, and the match of its beginning."""
        matches = ((kind, pattern.match(name)) for kind, pattern in self.patterns.items())
        return next(((kind, match) for kind, match in matches if match), None)


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_ALONE = {  # by name what every layout has, each of query, key and value for itself
    "embed": _same("proj.", "norm."),
    "block": _same(_QUERY, _KEY, _VALUE, "attn.proj.", "attn.sr.", "attn.norm.", "norm1.", "norm2.",
                   "mlp.fc1.", "mlp.dwconv.dwconv.", "mlp.fc2."),
    "norm": _same(""),
}  # fmt: skip
_OURS = {"embed": "patch_embed{n}.", "block": "block{n}.{j}.", "norm": "norm{n}."}
_SEPARATE = Layout("query, key and value each alone", _OURS, _ALONE, "head.")

LAYOUTS = {
    "mit": Layout(
        "mit_b*.pth",
        _OURS,
        _ALONE
        | {
            "block": {name: ours for name, ours in _ALONE["block"].items() if name not in (_KEY, _VALUE)}
            | {"attn.kv.": (_KEY, _VALUE)}
        },
        "head.",
    ),
    "huggingface": Layout(
        "Hugging Face",
        {
            "embed": "encoder.patch_embeddings.{i}.",
            "block": "encoder.block.{i}.{j}.",
            "norm": "encoder.layer_norm.{i}.",
        },
        {
            "embed": {"proj.": ("proj.",), "layer_norm.": ("norm.",)},
            "block": {
                "attention.self.query.": (_QUERY,),
                "attention.self.key.": (_KEY,),
                "attention.self.value.": (_VALUE,),
                "attention.self.sr.": ("attn.sr.",),
                "attention.self.layer_norm.": ("attn.norm.",),
                "attention.output.dense.": ("attn.proj.",),
                "layer_norm_1.": ("norm1.",),
                "layer_norm_2.": ("norm2.",),
                "mlp.dense1.": ("mlp.fc1.",),
                "mlp.dwconv.dwconv.": ("mlp.dwconv.dwconv.",),
                "mlp.dense2.": ("mlp.fc2.",),
            },
            "norm": _same(""),
        },
        "classifier.",
        wrapper="segformer.",
    ),
    "mmseg": Layout(
        "mmsegmentation",
        {"embed": "layers.{i}.0.", "block": "layers.{i}.1.{j}.", "norm": "layers.{i}.2."},
        {
            "embed": {"projection.": ("proj.",), "norm.": ("norm.",)},
            "block": {
                "attn.attn.in_proj_": (_QUERY, _KEY, _VALUE),
                "attn.attn.out_proj.": ("attn.proj.",),
                **_same("attn.sr.", "attn.norm.", "norm1.", "norm2."),
                "ffn.layers.0.": ("mlp.fc1.",),
                "ffn.layers.1.": ("mlp.dwconv.dwconv.",),
                "ffn.layers.4.": ("mlp.fc2.",),
            },
            "norm": _same(""),
        },
        convolved=("ffn.layers.0.", "ffn.layers.4."),
    ),
    "transformers": Layout(
        "transformers 5 in memory",
        {"embed": "stages.{i}.patch_embeddings.", "block": "stages.{i}.blocks.{j}.", "norm": "stages.{i}.layer_norm."},
        {
            "embed": {"proj.": ("proj.",), "layer_norm.": ("norm.",)},
            "block": {
                "attention.q_proj.": (_QUERY,),
                "attention.k_proj.": (_KEY,),
                "attention.v_proj.": (_VALUE,),
                "attention.sequence_reduction.sequence_reduction.": ("attn.sr.",),
                "attention.sequence_reduction.layer_norm.": ("attn.norm.",),
                "attention.o_proj.": ("attn.proj.",),
                "layernorm_before.": ("norm1.",),
                "layernorm_after.": ("norm2.",),
                **_same("mlp.fc1.", "mlp.dwconv.dwconv.", "mlp.fc2."),
            },
            "norm": _same(""),
        },
        "classifier.",
        wrapper="segformer.",
    ),
}


class Found(NamedTuple):
    """MiT weights in a file: the layout's name, the tensors by our names, and the names of those that are of none."""

    layout: str
    state: dict[str, Tensor]
    others: list[str]


def find_mit(state: Mapping[str, Tensor]) -> Found | None:
    """The one MiT among named tensors of any layout; None where there is none.

    Raises:
        ValueError: there are several (a teacher's and a student's), as many tensors of each.
    """
    for name, layout in LAYOUTS.items():
        prefixes = [found.removesuffix(layout.first) for found in state if _ends(found, layout.first)]
        if not prefixes:
            continue
        counts = {prefix: sum(_known(found, prefix, layout) for found in state) for prefix in prefixes}
        best = [prefix for prefix in prefixes if counts[prefix] == max(counts.values())]
        if len(best) > 1:
            raise ValueError(f"holds several networks of this kind ({', '.join(best)}): keep one of them")
        inside = {found.removeprefix(best[0]): value for found, value in state.items() if found.startswith(best[0])}
        others = [found for found in state if not _known(found, best[0], layout)]
        ours = _regrouped(inside, layout, LAYOUTS["mit"])
        if layout.head is not None:
            heads = best[0].removesuffix(layout.wrapper) + layout.head
            ours |= {found.replace(heads, "head.", 1): state[found] for found in others if found.startswith(heads)}
            others = [found for found in others if not found.startswith(heads)]
        return Found(name, ours, others)
    return None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _known(name: str, prefix: str, layout: Layout) -> bool:
    return name.startswith(prefix) and layout.begin(name.removeprefix(prefix)) is not None


def renamed(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """MiT weights by our names -> by those of a layout, without its wrapper's name before them.

    A head that the layout does not keep is left out.
    """
    to = LAYOUTS[layout]
    out = {to.wrapper + name: value for name, value in _regrouped(state, LAYOUTS["mit"], to).items()}
    if to.head is not None:
        out |= {to.head + name.removeprefix("head."): state[name] for name in state if name.startswith("head.")}
    return out


def _regrouped(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """From one layout to another, without what is of none. What misses a tensor that belongs into the same one keeps
    our name, which the target does not know.
    """
    return _together(_alone(state, source), target)


def _alone(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights of a layout by our names, but query, key and value each for itself."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, match = layout.begin(name) or (None, None)
        if kind is None:
            continue
        parts, rest, numbers = layout.parts[kind], name[match.end() :], match.groupdict()
        stage = int(numbers["n"]) if "n" in numbers else int(numbers["i"]) + 1
        beginning = _OURS[kind].format(n=stage, j=numbers.get("j"))
        part = next((part for part in parts if rest.startswith(part)), None)
        if part is None or value.ndim == 0:
            out[beginning + rest] = value
            continue
        if part in layout.convolved and value.ndim == 4:
            value = value.flatten(1)
        for ours, piece in zip(parts[part], value.chunk(len(parts[part]))):
            out[beginning + ours + rest.removeprefix(part)] = piece
    return out


def _together(alone: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The reverse of :func:`_alone`."""
    out: dict[str, Tensor] = {}
    for name, value in alone.items():
        kind, match = _SEPARATE.begin(name)
        numbers, rest = match.groupdict(), name[match.end() :]
        beginning = layout.stages[kind].format(i=int(numbers["n"]) - 1, **numbers)
        part, ours = next(
            ((part, ours) for part, ours in layout.parts[kind].items() if rest.startswith(ours)), (None, ())
        )
        end = rest.removeprefix(next((each for each in ours if rest.startswith(each)), ""))
        pieces = [match[0] + each + end for each in ours]
        if part is None or any(piece not in alone for piece in pieces):
            out[beginning + rest] = value
        elif name == pieces[0]:
            value = value if len(pieces) == 1 else torch.cat([alone[piece] for piece in pieces])
            convolved = part in layout.convolved and value.ndim == 2
            out[beginning + part + end] = value[:, :, None, None] if convolved else value
    return out
