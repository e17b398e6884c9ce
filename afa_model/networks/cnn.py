"""CNNs of timm's: the CAM-only baseline of the paper's Figure 3a."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..runtime.tensor_files import nothing_runs
from .weights import check_finite, read_weights, under_prefix, weights_in


class NoMaps(ValueError):
    """A timm model gives no feature maps at a stride."""


def create_cnn(name: str, output_stride: int, pretrained: bool | str | Path, args: dict[str, Any]) -> nn.Module:
    """The last feature map of a convolutional timm model at 1/output_stride of the image.

    Raises:
        NoMaps: it gives none.
        ValueError: the weights do not fit it.
        FileNotFoundError: no file at ``pretrained``.
    """
    try:
        with nothing_runs():
            model = timm.create_model(
                name,
                pretrained=pretrained is True,
                features_only=True,
                out_indices=(-1,),
                output_stride=output_stride,
                **args,
            )
    except (TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise NoMaps(f"it does not give feature maps at stride {output_stride}") from error
    if not isinstance(pretrained, bool):
        content = read_weights(pretrained)
        try:
            state = under_prefix(weights_in(content), list(model.state_dict()))
            missing = model.load_state_dict(state, strict=False).missing_keys
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"pretrained: {pretrained} does not hold the weights of {name}: {error}") from error
        if missing:
            raise ValueError(
                f"pretrained: {pretrained} lacks {len(missing)} tensors of {name}, e.g. {missing[0]}"
            )
        check_finite(model, pretrained)
    return model
