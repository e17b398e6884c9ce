"""CNNs of timm's: the CAM-only baseline of the paper's Figure 3a."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn


def create_cnn(name: str, output_stride: int, pretrained: bool | str | Path, args: dict[str, Any]) -> nn.Module:
    """The last feature map of a convolutional timm model at 1/output_stride of the image."""
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained is True,
            features_only=True,
            out_indices=(-1,),
            output_stride=output_stride,
            **args,
        )
    except (TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"backbone: timm's {name} does not give feature maps at stride {output_stride} ({error});"
            " take a MiT or a CNN such as resnet50"
        ) from error
    if not isinstance(pretrained, bool):
        if not Path(pretrained).is_file():
            raise FileNotFoundError(f"pretrained: no weight file at {pretrained}")
        state = timm.models.load_state_dict(str(pretrained))
        missing = model.load_state_dict(state, strict=False).missing_keys
        if missing:
            raise ValueError(
                f"pretrained: {pretrained} lacks {len(missing)} tensors of {name}, e.g. {missing[0]}"
            )
    return model
