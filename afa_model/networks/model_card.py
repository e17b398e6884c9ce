"""README.md of a published model: what it is, how well it does and by which protocol, how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PROTOCOLS = {
    "training": "as while training: the photograph at its own size, one pass",
    "test": "as of a trained model: longer side 512, three scales with flips",
}

_USE = """## Use

```python
from afa_model import AFA

model = AFA.from_pretrained("ORG/NAME")  # or a folder with these files
result = model(images)  # [B, 3, H, W], normalised by ImageNet's mean and deviation
result.seg_logits  # [B, K, h, w], background first
```

    afa predict photo.jpg --checkpoint FOLDER
    afa evaluate --checkpoint FOLDER --data.root VOC2012"""


def card_text(arguments: Mapping[str, Any], class_names: Sequence[str] | None, about: Mapping[str, Any]) -> str:
    """The card without its header.

    ``about``: ``iteration``, steps of training, and ``scores``: ``protocol``, ``split``, ``images``, a ``note``, and as
    ``miou`` percent by kind of label map; each where it is known.
    """
    count, iteration = arguments["num_classes"], about.get("iteration")
    trained = f", trained for {iteration} steps from image-level labels" if iteration else ""
    parts = [
        f"# AFA, {arguments['backbone']}, {count} classes",
        f"Weakly-supervised semantic segmentation after *Learning Affinity from Attention: End-to-End Weakly-Supervised"
        f" Semantic Segmentation with Transformers* (Ru et al., CVPR 2022, [arXiv:2203.02664]"
        f"(https://arxiv.org/abs/2203.02664)){trained}.",
        _scores(about.get("scores")),
        _USE,
        _classes(class_names),
        f"## Licence\n\nPlease say which licence the weights have. {_inherited(arguments['backbone'])}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _inherited(backbone: str) -> str:
    if backbone.startswith("mit_"):
        return (
            "Those of MiT backbones from ImageNet are NVIDIA's, for non-commercial use, and what was trained from them"
            " inherits that."
        )
    return f"What was trained from pretrained weights of {backbone} inherits theirs."


def _scores(scores: Mapping[str, Any] | None) -> str:
    if not scores or not scores.get("miou"):
        return "No scores were given with these weights."
    protocol = scores.get("protocol")
    told = _PROTOCOLS.get(protocol, "not known")
    where = f"{scores['images']} images of " if scores.get("images") else ""
    rows = "\n".join(f"| {kind.replace('_', ' ')} | {value:.2f} |" for kind, value in scores["miou"].items())
    note = f"\n\n{scores['note']}" if scores.get("note") else ""
    measured = f"On {where}`{scores.get('split', 'val')}`, protocol *{protocol or 'not known'}* ({told})."
    return (
        f"## Scores\n\n{measured}{note}\n\n| label map | mIoU (%) |\n|---|---:|\n{rows}"
    )


def _classes(names: Sequence[str] | None) -> str:
    if names is None:
        return ""
    return "## Classes\n\n" + ", ".join(f"{index} {name}" for index, name in enumerate(names))
