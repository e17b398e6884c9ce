"""Optimizer, parameter groups and learning rate (section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, head_multiplier: float = 10.0) -> list[dict[str, Any]]:
    """The trainable parameters in four named groups, each with ``lr_scale``, its share of the learning rate.

    backbone        x 1
    backbone_norms  x 0: frozen; they keep their ImageNet values (also no weight decay)
    heads           x ``head_multiplier``: classifier and affinity head
    decoder         x ``head_multiplier``

    Empty groups (the decoder of a CNN baseline) are left out.
    """
    model = getattr(model, "module", model)
    norms = {
        id(parameter)
        for module in model.encoder.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, dict[str, Any]] = {
        "backbone": {"lr_scale": 1.0},
        "backbone_norms": {"lr_scale": 0.0, "weight_decay": 0.0},
        "heads": {"lr_scale": head_multiplier},
        "decoder": {"lr_scale": head_multiplier},
    }
    for name, group in groups.items():
        group.update(name=name, params=[])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        top = name.split(".", 1)[0]
        if top == "encoder":
            group = "backbone_norms" if id(parameter) in norms else "backbone"
        else:
            group = "decoder" if top == "decoder" else "heads"
        groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(
    model: nn.Module,
    lr: float = 6e-5,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    head_multiplier: float = 10.0,
    **kwargs: Any,
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; ``kwargs`` go to ``torch.optim.AdamW`` (``fused``, ...)."""
    groups = parameter_groups(model, head_multiplier)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, **kwargs)


def learning_rate(
    iteration: int,
    max_iters: int,
    lr: float = 6e-5,
    warmup_iters: int = 1500,
    warmup_ratio: float = 1e-6,
    power: float = 1.0,
) -> float:
    """The rate of step ``iteration`` (the first is 0): linear warm-up, then polynomial decay.

    The warm-up starts from ``lr * warmup_ratio``. The decay is counted from step 0, not from the end of the
    warm-up (so the rate drops a little where they meet, as published), and reaches 0 at ``max_iters``.
    """
    if iteration < warmup_iters:
        return lr * (1.0 - (1.0 - iteration / warmup_iters) * (1.0 - warmup_ratio))
    return lr * max(0.0, 1.0 - iteration / max_iters) ** power


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of :func:`build_optimizer` its multiple of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
