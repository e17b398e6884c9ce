"""What each refinement makes of real CAMs (imagenet_cams.py), over all background scores and not at the best alone.

Called by `quality_refinement.py --cams imagenet`. The image-level labels are those of the masks. For every refinement:

- mIoU at each background score; at the best one, which the masks told; at 0.45, which the published evaluation has;
  and, an upper bound, with the best score of each photograph by itself;
- the gain over the CAM at its own best score, and where it lies if the photographs are drawn anew;
- at the best score trimap mIoU and boundary F-score (boundary_scores.py) of 5 and 20 pixels, and IoU class by class.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from boundary_scores import boundary_f, trimap
from imagenet_cams import BEST, SCALES, imagenet_cam, imagenet_network, voc_groups
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from refined_labels import BACKGROUNDS, Photo, Refine, Sweep, confusion_of, gain_interval, miou, refined_labels, sweep
from torch import Tensor, nn

from afa_model.data.classes import VOC_CLASSES
from afa_model.evaluation.scores import Scores
from afa_model.runtime.progress import progress
from afa_model.runtime.writing import whole, writable_folder

SPLITS = ("train_aug", "val")
PIXELS = (5, 20)
PUBLISHED = 0.45


def photo_of(network: nn.Module, image: Tensor, mask: Tensor, scales: Sequence[float] = SCALES) -> Photo:
    """A photograph with the CAMs of the classes in its mask; image [1, 3, H, W] in 0..1, mask [H, W]."""
    groups = voc_groups()
    classes = [number for number in mask.unique().tolist() if number in groups]
    cam = imagenet_cam(network, image, [groups[number] for number in classes], scales)
    return Photo(image, mask, torch.tensor(classes), cam)


def photos_of(pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float] = SCALES) -> list[Photo]:
    """Those that show any class of VOC, a second or more for each."""
    network = imagenet_network()
    shown = [(image, mask) for image, mask in pairs if ((mask > 0) & (mask < len(VOC_CLASSES))).any()]
    return [photo_of(network, image, mask, scales) for image, mask in progress(shown, "CAMs")]


def at_boundaries(photos: Sequence[Photo], refine: Refine, background: float) -> dict[str, float]:
    """Trimap mIoU and boundary F-score in per cent, the latter a mean over photographs."""
    bands = dict.fromkeys(PIXELS, torch.zeros((), dtype=torch.int64))
    contours: dict[int, list[float]] = {pixels: [] for pixels in PIXELS}
    for photo in photos:
        label = refined_labels(photo.image, photo.scores(background), photo.classes, refine)[0]
        for pixels in PIXELS:
            bands[pixels] = bands[pixels] + confusion_of(label, photo.mask, trimap(photo.mask, pixels))
            contours[pixels].append(100 * boundary_f(label, photo.mask, pixels))
    scores = {f"trimap_{pixels}": miou(bands[pixels]) for pixels in PIXELS}
    return scores | {f"boundary_f_{pixels}": sum(contours[pixels]) / len(photos) for pixels in PIXELS}


def row_of(
    name: str, paper: float, photos: Sequence[Photo], refine: Refine, swept: Sweep, cam: Sweep
) -> dict[str, Any]:
    """Everything about one refinement, in per cent; ``cam``: of no refinement."""
    mious, best = swept.mious, swept.best
    low, high = gain_interval(cam.best_confusions, swept.best_confusions)
    iou = Scores.of(swept.best_confusions.sum(0)).iou
    return {
        "refinement": name,
        "best": mious[best],
        "background": swept.backgrounds[best],
        "gain": mious[best] - max(cam.mious),
        "gain_low": low,
        "gain_high": high,
        "published": mious[swept.backgrounds.index(PUBLISHED)],
        "per_photograph": swept.per_photograph(),
        **at_boundaries(photos, refine, swept.backgrounds[best]),
        "paper": paper,
        "sweep": dict(zip(map(str, swept.backgrounds), mious)),
        "iou": {name: 100 * value for name, value in zip(VOC_CLASSES, iou.tolist()) if value == value},
    }


def measure(photos: Sequence[Photo], rows: Sequence[tuple[str, Refine, float]]) -> list[dict[str, Any]]:
    """rows: (name, refinement, the paper's mIoU), the first without refinement."""
    cam, results = None, []
    for name, refine, paper in rows:
        swept = sweep(photos, refine, watch=partial(progress, title=name, total=len(photos)))
        cam = cam or swept
        results.append(row_of(name, paper, photos, refine, swept, cam))
    return results


COLUMNS = {
    "best": "best mIoU",
    "background": "at score",
    "gain": "gain",
    "published": f"mIoU at {PUBLISHED}",
    "per_photograph": "each photograph's best score",
    **{f"trimap_{pixels}": f"trimap {pixels} px" for pixels in PIXELS},
    **{f"boundary_f_{pixels}": f"boundary F {pixels} px" for pixels in PIXELS},
    "paper": "paper, Table 2",
}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Three tables: of everything, over the background scores, class by class."""
    lines = ["| refinement | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in results:
        cells = {key: f"{row[key]:.1f}" for key in COLUMNS} | {"background": f"{row['background']:.2f}"}
        if row["gain_high"] > row["gain_low"]:
            cells["gain"] = f"{row['gain']:+.1f} ({row['gain_low']:+.1f} to {row['gain_high']:+.1f})"
        lines.append(f"| {row['refinement']} | " + " | ".join(cells.values()) + " |")
    lines += ["", *_pivot("background score", results, "sweep"), "", *_pivot("class", results, "iou")]
    return "\n".join(lines) + "\n"


def _pivot(corner: str, results: Sequence[dict[str, Any]], key: str) -> list[str]:
    names = " | ".join(row["refinement"] for row in results)
    return [f"| {corner} | {names} |", "|---|" + "---:|" * len(results)] + [
        f"| {label} | " + " | ".join(f"{row[key].get(label, float('nan')):.1f}" for row in results) + " |"
        for label in results[0][key]
    ]


def write(results: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """``real_cams.json``, ``.csv`` (a row for each refinement) and ``.png`` (the sweep)."""
    with whole(folder / "real_cams.json") as path:
        content = {"about": about, "results": results}
        path.write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")
    flat = [
        {key: value for key, value in row.items() if key not in ("sweep", "iou")}
        | {f"miou at {score}": value for score, value in row["sweep"].items()}
        | {f"iou {name}": value for name, value in row["iou"].items()}
        for row in results
    ]
    with whole(folder / "real_cams.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(_rounded(flat))
    with whole(folder / "real_cams.png") as path:
        plot(results).savefig(path, dpi=110)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def plot(results: Sequence[dict[str, Any]]) -> Figure:
    """mIoU over the background score, a line for each refinement."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in results:
        xs, ys = [float(score) for score in row["sweep"]], list(row["sweep"].values())
        (line,) = axes.plot(xs, ys, label=f"{row['refinement']}: {row['best']:.1f}", lw=1.5)
        axes.plot(row["background"], row["best"], "o", color=line.get_color())
    axes.set(xlabel="background score", ylabel="mIoU (%)", title="Labels of ImageNet CAMs after refinement")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="best", title_fontsize=8)
    return figure


def report(
    pairs: Sequence[tuple[Tensor, Tensor]], rows: Sequence[tuple[str, Refine, float]], folder: Path | None = None
) -> str:
    """CAMs of all photographs (image [1, 3, H, W] in 0..1, mask [H, W]), refined by every row: the tables as Markdown.

    folder: where files of the results are written, if at all.
    """
    if folder is not None:
        writable_folder(folder, "out-folder")
    photos = photos_of(pairs)
    results = measure(photos, rows)
    if folder is not None:
        about = {"photographs": len(photos), "cam_scales": SCALES, "best_classes": BEST, "backgrounds": BACKGROUNDS}
        write(results, about, folder)
    return markdown(results)
