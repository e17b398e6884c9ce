"""Optimizer, parameter groups and learning rate (section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conventions import require


@dataclass
class OptimSettings:
    """AdamW.

    Args:
        lr: learning rate of the backbone.
        head_multiplier: the classifiers, affinity head and decoder learn this many times faster.
        weight_decay: of all weights but the backbone's norms, position embeddings and tokens.
        freeze_norms: the backbone's norm layers keep the values they begin with (AFA); false lets them learn as the
            rest of the backbone does (ToCo).
        betas: decay rates of AdamW's running averages.
        clip_norm: gradients longer than this are scaled down to it; null leaves them as they are.
    """

    lr: float = 6e-5
    head_multiplier: float = 10.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    freeze_norms: bool = True

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "lr", "a positive number", self.lr)
        require(self.head_multiplier > 0, "head_multiplier", "a positive number", self.head_multiplier)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "numbers in 0..1 (1 not included)", self.betas)
        positive = self.clip_norm is None or self.clip_norm > 0
        require(positive, "clip_norm", "a positive number or null", self.clip_norm)


@dataclass
class ScheduleSettings:
    """Learning rate over the iterations: linear warm-up, then polynomial decay to 0.

    Args:
        max_iters: length of the training, in steps.
        warmup_iters: length of the warm-up, in steps.
        warmup_ratio: the warm-up starts from this times the learning rate.
        power: of the decay; 1 is linear.
        scale: multiplies every count of steps of the run (these two, step.cam_iters and aff_iters, and how often it
            evaluates, saves, logs and draws): 0.01 rehearses a published run in a hundredth of its length. What a run
            keeps of its settings are the counts that come out, with a scale of 1.
    """

    max_iters: int = 20_000
    warmup_iters: int = 1_500
    warmup_ratio: float = 1e-6
    power: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_iters >= 1, "max_iters", "at least 1", self.max_iters)
        require(self.warmup_iters >= 0, "warmup_iters", "at least 0", self.warmup_iters)
        require(self.power >= 0, "power", "at least 0", self.power)
        require(0 < self.scale < float("inf"), "scale", "a positive number", self.scale)
        require(0 < self.warmup_ratio <= 1, "warmup_ratio", "a number in 0..1 (0 not included)", self.warmup_ratio)


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def _is_norm(module: nn.Module) -> bool:
    # Some of timm's are none of torch's classes.
    return isinstance(module, _NORMS) or type(module).__module__ == "timm.layers.norm"


def _norms(backbone: nn.Module) -> set[int]:
    """The parameters of its norm layers, by their ids."""
    found = filter(_is_norm, backbone.modules())
    return {id(parameter) for module in found for parameter in module.parameters(recurse=False)}


def _undecayed(backbone: nn.Module) -> set[int]:
    """The parameters that a timm model says should not decay, by their ids: a Vision Transformer's position embeddings,
    class token and the like; none of a MiT.
    """
    said = [(module, module.no_weight_decay()) for module in backbone.modules() if hasattr(module, "no_weight_decay")]
    return {id(value) for module, names in said for name, value in module.named_parameters() if name in names}


def parameter_groups(
    model: nn.Module, head_multiplier: float = 10.0, freeze_norms: bool = True
) -> list[dict[str, Any]]:
    """The trainable parameters in named groups, each with ``lr_scale``, its share of the learning rate.

    backbone            x 1
    backbone_norms      x 0: they keep their ImageNet values; x 1 without ``freeze_norms``; no weight decay
    backbone_positions  x 1: position embeddings, class token and the like of a Vision Transformer; no weight decay
    heads               x ``head_multiplier``: classifier, auxiliary classifier and affinity head
    decoder             x ``head_multiplier``

    Empty groups (the decoder of a CNN baseline, all of a frozen backbone's) are left out. A wrapped model
    (DataParallel's ``module``) is taken too.
    """
    model = getattr(model, "module", model)
    norms, undecayed = _norms(model.encoder), _undecayed(model.encoder)
    groups: dict[str, dict[str, Any]] = {
        "backbone": {"lr_scale": 1.0},
        "backbone_norms": {"lr_scale": 0.0 if freeze_norms else 1.0, "weight_decay": 0.0},
        "backbone_positions": {"lr_scale": 1.0, "weight_decay": 0.0},
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
            number = id(parameter)
            group = "backbone"
            if number in norms or number in undecayed:
                group = "backbone_norms" if number in norms else "backbone_positions"
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
    freeze_norms: bool = True,
    **kwargs: Any,
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; ``kwargs`` go to ``torch.optim.AdamW`` (``fused``, ...)."""
    groups = parameter_groups(model, head_multiplier, freeze_norms)
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
