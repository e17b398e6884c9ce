"""What a row scores: a network's segmentation, or what refinements make of its CAM; kept in a file of its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..data.datasets import EvaluationSet
from ..errors import ConfigError
from ..evaluation.evaluate import EvaluateSettings, evaluate
from ..evaluation.scores import ScoreKeeper, Scores
from ..labels.evidence import MapSettings
from ..labels.label_maps import cam_label, label_maps
from ..labels.settings import LabelSettings
from ..runs.restore import load_model
from ..runtime.processes import processes
from ..runtime.progress import progress
from ..runtime.writing import whole
from .paper import PaperTable
from .runs import with_settings


def kept(path: Path, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The scores in a file, if there are any and these settings made them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content["scores"] if content.get("settings") == _plain(settings) else None


def keep(path: Path, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write scores and what made them; whoever looks finds the whole file or none."""
    with whole(path) as draft:
        text = json.dumps({"settings": _plain(settings), "scores": scores}, indent=1)
        draft.write_text(text + "\n", encoding="utf-8")


def digest_of(path: Path) -> str:
    """A word for what is in a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:16]


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def evaluation_of(config: Config, table: PaperTable) -> EvaluateSettings:
    """How a table evaluates: as the configuration says, by the table's protocol."""
    return replace(config.eval, protocol=table.protocol or "training", kinds=table.kinds or None, crf=False)


def about(config: Config, table: PaperTable) -> dict[str, Any]:
    """All that decides the scores of a network in a table."""
    settings = asdict(evaluation_of(config, table))
    for name in ("every", "num_workers", "progress", "batch", "channels_last"):
        settings.pop(name)
    rows = {row.name: row.settings for row in table.rows} if table.refines else {}
    return {"split": split_of(config, table), "eval": settings, "labels": asdict(config.labels), "rows": rows}


def split_of(config: Config, table: PaperTable) -> str:
    """The list of images that a table is scored on; that of a configuration may have another name for ``val``."""
    return config.data.val_split if table.split == "val" else table.split


def segmentation_scores(checkpoint: Path, config: Config, table: PaperTable) -> dict[str, Any]:
    """Scores of a network by a table's protocol, as :meth:`Scores.as_dict` has them, by kind of label map."""
    with processes(config.device) as here:
        model = load_model(checkpoint).model.to(here.device)
        dataset = EvaluationSet(config.data, split_of(config, table))
        result = evaluate(model, dataset, evaluation_of(config, table), config.labels)
    return {kind: scores.as_dict(result.class_names) for kind, scores in result.scores.items()}


def refinement_scores(checkpoint: Path, config: Config, table: PaperTable) -> dict[str, Any]:
    """Scores of each row's refinement of a network's CAM, of the classes that a picture is known to show, by row.

    Raises:
        ConfigError: the network has other classes than the data.
    """
    rows = {row.name: with_settings(config, row.settings).labels for row in table.rows}
    with processes(config.device) as here:
        model = load_model(checkpoint).model.to(here.device)
        dataset = EvaluationSet(config.data, split_of(config, table))
        if model.num_classes != dataset.num_classes:
            raise ConfigError(
                f"checkpoint: {checkpoint} knows {model.num_classes} classes, the data have {dataset.num_classes}"
            )
        settings = evaluation_of(config, table)
        scores = refinements(model, dataset, settings.maps(), settings.labels(config.labels), rows, settings.limit)
    return {name: score.as_dict(dataset.class_names) for name, score in scores.items()}


@torch.no_grad()
def refinements(
    model: nn.Module,
    dataset: EvaluationSet,
    sizes: MapSettings,
    how: LabelSettings,
    rows: Mapping[str, LabelSettings],
    limit: int | None = None,
) -> dict[str, Scores]:
    """What each of several refinements makes of the CAMs of a data set, each of which is made once.

    Labels are made as training and evaluation make them (:func:`~..labels.pseudo_labels.refine_label`): softmax of the
    CAM beside one background score at half the picture's size, refinement, the strongest wins.

    Args:
        model: any that gives CAMs.
        dataset: pictures with masks.
        sizes: in which they go through the model.
        how: the CAM is made.
        rows: name -> settings of a refinement; with ``none`` the CAM itself, at full size.
        limit: take the first so many pictures only.
    """
    keeper = ScoreKeeper(tuple(rows), dataset.num_classes, next(model.parameters()).device)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    for number in progress(range(total), "refining", total):
        sample = dataset[number]
        image, mask = sample["image"], sample["mask"]
        maps = label_maps(model, image, sizes, how, sample["cls_labels"], ("cam",))
        for name, refined in rows.items():
            keeper.add(name, cam_label(image, maps.cam, maps.cls_labels, refined), mask)
    return keeper.scores()
