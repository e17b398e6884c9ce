"""`afa demo`: a small AFA learns from image-level labels on generated pictures; what each part of it adds.

The data come from ``data/synthetic.py``, the run from the one training loop with ``config/demo.yaml``, or, with a
Vision Transformer, ``config/demo_vit.yaml``. CAM, refined CAM and random-walk label know which classes a picture shows,
as in the paper's Table 2; the segmentation does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..config import Config, parse, to_dict
from ..conventions import denormalize
from ..data.classes import voc_palette
from ..data.datasets import EvaluationSet
from ..data.synthetic import SyntheticSettings, synthetic_data
from ..errors import ConfigError
from ..evaluation.scores import ScoreKeeper, Scores
from ..labels.evidence import MapSettings
from ..labels.kinds import KINDS
from ..labels.label_maps import cam_label, label_maps
from ..labels.settings import LabelSettings
from ..networks.create import create_backbone
from ..networks.settings import STRIDE
from ..pictures.overlays import label_overlay, photo_of
from ..pictures.panels import cam_tile, peak_of, prediction_panel, save
from ..pictures.words import write
from ..runs.loop import train
from ..runs.restore import Restored, load_model
from ..runtime.processes import processes
from ..runtime.progress import progress
from .options import given

# Rows of the table, in the order in which they build on each other.
OF_THE_CAM = {"pamr": "CAM + PAMR", "crf": "CAM + CRF"}  # refinements beside PAR
ROWS = {"cam": KINDS["cam"], **OF_THE_CAM, **KINDS}
WITHOUT_ENERGY = "segmentation_without_energy"  # of a second run, where the first has the energy loss
TITLES = {**ROWS, WITHOUT_ENERGY: "segmentation, no L_reg"}
PANELS = 6  # pictures with a panel of their own
OVERVIEW_ROWS = 4


@dataclass(frozen=True)
class DemoResult:
    """What :func:`demo` found.

    Attributes:
        scores: for each row of the table.
        folder: where the run, ``scores.json``, ``overview.png`` and ``panels`` are.
        pictures: the files to look at, the overview first.
        images: number of pictures scored.
    """

    scores: Mapping[str, Scores]
    folder: Path
    pictures: tuple[Path, ...]
    images: int

    def table(self) -> Table:
        """mIoU in percent, and what is gained over the CAM."""
        table = Table(
            title=f"mIoU in percent on {self.images} pictures the model was not trained on",
            box=box.SIMPLE_HEAD,
            title_justify="left",
        )
        table.add_column("label", no_wrap=True)
        table.add_column("mIoU", justify="right")
        table.add_column("over CAM", justify="right")
        base = self.scores["cam"].miou
        for kind in self.scores:
            miou = self.scores[kind].miou
            gain = "" if kind == "cam" else f"{100 * (miou - base):+.1f}"
            table.add_row(TITLES[kind], f"{100 * miou:.1f}", gain)
        return table


def demo(config: Config, data: SyntheticSettings | None = None) -> DemoResult:
    """Generate the data if they are not there, train, score, and draw.

    Args:
        config: of the run; an empty ``data.root`` stands for the cache. A run that ``out`` holds already is
            gone on with, or only scored if it is complete (``resume`` is ``auto`` in ``config/demo.yaml``).
        data: what is generated.

    With the energy loss (``loss.regularisation``) a second run without it is trained, in ``out/without_energy_loss``,
    whose segmentation is a row more.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as :func:`afa_model.runs.loop.train`;
        KeyboardInterrupt if the training was stopped.
    """
    if config.labels.refinement != "par":
        raise ConfigError(f"labels.refinement: the demo sets PAR beside PAMR, got {config.labels.refinement!r}")
    data = data or SyntheticSettings()
    config.data.root = str(synthetic_data(data, config.data.root or None))
    restored = _trained(config)
    other = _trained(_without_energy(config)) if config.loss.regularises else None
    dataset = EvaluationSet(config.data)
    folder = Path(config.out)
    print(f"scoring {len(dataset)} pictures that {restored.path} was not trained on", flush=True)
    with processes(config.device) as here:
        model = restored.model.to(here.device)
        without = None if other is None else other.model.to(here.device)
        keeper = ScoreKeeper((*ROWS, *([WITHOUT_ENERGY] if other else [])), dataset.num_classes, here.device)
        how = config.eval.labels(config.labels)
        pictures = _score_and_draw(model, without, dataset, config.eval.maps(), how, keeper, folder)
    scores = keeper.scores()
    result = DemoResult(scores, folder, tuple(pictures), len(dataset))
    report = {kind: scores[kind].as_dict(dataset.class_names) for kind in scores}
    (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return result


def _trained(config: Config) -> Restored:
    """The model of a complete run."""
    summary = train(config)
    if summary.interrupted:
        raise KeyboardInterrupt
    return load_model(summary.checkpoint)


def _without_energy(config: Config) -> Config:
    loss = replace(config.loss, regularisation=0.0)
    return replace(config, loss=loss, out=str(Path(config.out, "without_energy_loss")))


@torch.no_grad()
def _score_and_draw(
    model: nn.Module,
    without_energy: nn.Module | None,
    dataset: EvaluationSet,
    settings: MapSettings,
    how: LabelSettings,
    keeper: ScoreKeeper,
    folder: Path,
) -> list[Path]:
    """Add every picture's label maps to ``keeper``; draw some. Gives the files drawn, the overview first."""
    panels, shown = [], []
    for sample in progress(dataset, "scoring", len(dataset)):
        image, present = sample["image"], sample["cls_labels"]
        maps = label_maps(model, image, settings, how, present)
        labels = {"cam": maps.labels["cam"]}
        for kind in OF_THE_CAM:
            labels[kind] = cam_label(image, maps.cam, present, replace(how, refinement=kind))
        labels |= maps.labels
        if without_energy is not None:
            other = label_maps(without_energy, image, settings, how, present, ("segmentation",))
            labels[WITHOUT_ENERGY] = other.labels["segmentation"]
        for kind, label in labels.items():
            keeper.add(kind, label, sample["mask"])
        if present.sum() < 2 or len(panels) == PANELS:
            continue
        photo, cam = photo_of(denormalize(image)), maps.cam.cpu()
        labels = {kind: label.cpu() for kind, label in labels.items()}
        figure = prediction_panel(
            photo,
            title=sample["name"],
            cam=cam,
            affinity=maps.affinity.float().cpu(),
            point=peak_of(cam, maps.present),
            pseudo_label=labels["refined_random_walk"],
            prediction=labels["segmentation"],
            more={TITLES[kind]: labels[kind] for kind in ("crf", WITHOUT_ENERGY) if kind in labels},
            class_names=dataset.class_names,
            probabilities=maps.probabilities.cpu(),
            present=maps.present,
            mask=sample["mask"],
        )
        panels.append(save(figure, folder / "panels" / f"{sample['name']}.png"))
        heat = cam_tile(photo, cam, maps.present, dataset.class_names).picture
        overlays = [label_overlay(photo, label) for label in (*labels.values(), sample["mask"])]
        if len(shown) < OVERVIEW_ROWS:
            shown.append([photo, heat, *overlays])
    if not shown:
        return panels
    kinds = [TITLES[kind] for kind in labels]
    titles = ["picture", "CAM", "CAM label", *kinds[1:], "ground truth"]
    overview = save(_overview(shown, titles, dataset.class_names), folder / "overview.png")
    return [overview, *panels]


def _overview(rows: Sequence[Sequence], titles: Sequence[str], names: Sequence[str]) -> Figure:
    """Pictures in a grid, one row for each photograph, one column for each kind of label; a legend below."""
    side, head, foot, gap = 1.7, 0.26, 0.34, 0.05  # inches
    width, height = len(titles) * side, head + len(rows) * side + foot
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            left, bottom = j * side + gap / 2, foot + (len(rows) - 1 - i) * side + gap / 2
            inner = side - gap
            axis = figure.add_axes((left / width, bottom / height, inner / width, inner / height))
            axis.imshow(picture, interpolation="antialiased")
            axis.set_axis_off()
            if i == 0:
                figure.text(
                    (j + 0.5) * side / width, 1 - 0.17 / height, titles[j], ha="center", va="center", fontsize=10
                )
    colours = voc_palette() / 255
    handles = [Patch(facecolor=colours[k], label=" ") for k in range(1, len(names))]
    legend = figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=10)
    for text, name in zip(legend.get_texts(), names[1:]):
        write(text, name)
    return figure


def settings_for(argv: Sequence[str]) -> str:
    """The packaged settings that the demo starts from: those of a Vision Transformer if the line asks for one, whose
    cells are its patches.
    """
    asked = given(argv, "--model.backbone")
    try:
        with torch.device("meta"):  # nothing is computed
            backbone = asked and create_backbone(asked, STRIDE, False, {})
    except ValueError:  # there is no such backbone: the model's own error says so
        backbone = None
    return "demo_vit" if hasattr(backbone, "cell") else "demo"


def main(argv: Sequence[str]) -> None:
    """`afa demo [--seed S] [--out DIR] [--SECTION.KEY VALUE ...]`."""
    start = time.perf_counter()
    config = parse(
        argv,
        "afa demo",
        "Train a small AFA from scratch on generated pictures (minutes on 2 CPU cores), print what CAM,"
        " PAMR, CRF, PAR, random walk and segmentation reach, and draw them. --out takes the run and the"
        " pictures, --data.root the generated data (a folder in the cache if not given); all settings of"
        " afa train are accepted. With --model.backbone of a Vision Transformer those of --config demo_vit are the"
        " defaults.",
        defaults=to_dict(parse(["--config", settings_for(argv)])),
    )
    result = demo(config)
    Console().print(result.table())
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"{minutes} min {seconds} s. Look at {result.pictures[0]} and {result.folder / 'panels'}")
