"""How much PAR, PAMR and the dense CRF mend coarse masks: Tables 2 and 3 of the supplement in small, without a network.

The ground-truth masks of a folder in VOC layout are coarsened to what a CAM gives (averaged to 1/16, blurred, scaled to
1 at each class's peak, background at a fixed score), refined under each setting, labelled by the highest score, and
scored in mIoU against the masks. The default blur makes the coarse masks about as bad as the paper's CAMs (48 %). It
refines real CAMs of a trained network, so its column is another experiment: only the order of settings compares.

With `--cams imagenet` the CAMs are real instead: of an ImageNet network that has never seen VOC (real_cams.py).

python benchmarks/quality_refinement.py VOC_FOLDER [--split train_aug] [--out docs/refinement.md]
python benchmarks/quality_refinement.py VOC_FOLDER --cams imagenet [--split train_aug val] [--out-folder FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import as_the_command  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from real_cams import SPLITS, report
from refined_labels import CLASSES, Refine, confusion_of, miou, refined_labels
from torchvision.transforms.functional import gaussian_blur

import afa_kernels
from afa_kernels.ops.par import DILATIONS
from afa_model.data.lists import read_split
from afa_model.labels import refinement
from afa_model.labels.settings import LabelSettings

STRIDE = 16


def by_name(name: str, num_iter=15) -> Refine:
    """One of the refinements that training chooses from."""
    how = LabelSettings(refinement=name, num_iter=num_iter)

    def refine(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shown = torch.ones(1, scores.shape[1], dtype=torch.bool)
        return refinement.refine(image, scores.flatten(0, 1)[None], shown, how)[0].unflatten(0, scores.shape[:2])

    return refine


def par(dilations=DILATIONS, num_iter=15, w=0.3, w3=0.01) -> Refine:
    def refine(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        refined = afa_kernels.par(image, scores.flatten(0, 1)[None], dilations, num_iter, w, w, w3)
        return refined[0].unflatten(0, scores.shape[:2])

    return refine


# Row of the paper's Table 2: (name, refinement, its mIoU on VOC train).
TABLE_2: list[tuple[str, Refine, float]] = [
    ("coarse (CAM)", by_name("none"), 48.2),
    ("PAMR, six dilations", by_name("pamr"), 51.4),
    ("CRF", by_name("crf"), 54.5),
    ("PAR, dilations 1-4, 15 iterations", par((1, 2, 4)), 48.8),
    ("PAR, dilations 1-8, 15 iterations", par((1, 2, 4, 8)), 49.9),
    ("PAR, dilations 1-12, 15 iterations", par((1, 2, 4, 8, 12)), 51.3),
    ("PAR, six, no position kernel, 15 iterations", par(w3=0.0), 51.5),
    ("PAR, six, 15 iterations", par(), 52.9),
    ("PAR, six, 20 iterations", par(num_iter=20), 52.9),
]
# For real CAMs: those that differ. Labels without the position kernel are the same (docs/refinement.md), and 20
# iterations are among real_cams_why.py's.
REAL_ROWS = [("CAM", *TABLE_2[0][1:]), *TABLE_2[1:6], TABLE_2[7]]
# Table 3: w1 = w2 down, w3 across; None where the paper has no number.
W12, W3 = (0.1, 0.3, 0.5, 0.7), (0.005, 0.01, 0.02, 0.03)
TABLE_3 = [
    [51.9, 51.7, 50.1, None],
    [52.8, 52.9, 51.4, 48.4],
    [51.9, 52.5, 51.3, 48.3],
    [None, 51.6, 50.9, 48.0],
]


def coarse_scores(mask: torch.Tensor, background: float, blur: float) -> torch.Tensor:
    """mask [H, W] of labels (255 ignored) -> [1, K, h, w] on the 1/16 grid: blobs that peak at 1, as a CAM's do.

    No class is taken for another one; a real CAM also errs that way.
    """
    height, width = mask.shape
    grid = (max(1, round(height / STRIDE)), max(1, round(width / STRIDE)))
    classes = F.one_hot(mask.where(mask < CLASSES, 0), CLASSES).permute(2, 0, 1)[None].float()
    scores = F.adaptive_avg_pool2d(classes, grid)[:, 1:]
    if blur > 0:
        reach = [min(2 * math.ceil(2 * blur) + 1, 2 * ((size - 1) // 2) + 1) for size in reversed(grid)]
        scores = gaussian_blur(scores, reach, [blur, blur])
    scores = scores / scores.amax((2, 3), keepdim=True).clamp_min(1e-5)
    return torch.cat([torch.full_like(scores[:, :1], background), scores], dim=1)


def load(root: Path, split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Photographs [1, 3, H, W] in 0..1 and masks [H, W] of a list.

    Raises:
        DataError: there is no such list; those that there are are named.
    """
    pairs = []
    for name in read_split(root, split):
        photo = Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = Image.open(root / "SegmentationClassAug" / f"{name}.png")
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
        pairs.append((image, torch.from_numpy(np.array(mask)).long()))
    return pairs


def score(pairs: list[tuple[torch.Tensor, torch.Tensor]], refine: Refine, background: float, blur: float) -> float:
    """Mean IoU in per cent over the classes that occur."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for image, mask in pairs:
        scores = coarse_scores(mask, background, blur)
        present = (scores[0].amax((1, 2)) > 0).nonzero()[:, 0]  # absent classes cost nothing
        confusion += confusion_of(refined_labels(image, scores[:, present], present[1:], refine)[0], mask)
    return miou(confusion)


def tables(pairs: list[tuple[torch.Tensor, torch.Tensor]], background: float, blur: float) -> str:
    """Both tables as Markdown."""
    lines = ["| refinement | mIoU here (%) | paper, Table 2 (%) |", "|---|---:|---:|"]
    for name, refine, paper in TABLE_2:
        lines.append(f"| {name} | {score(pairs, refine, background, blur):.1f} | {paper:.1f} |")
        print(lines[-1], file=sys.stderr)
    lines += ["", "| w1 = w2 | " + " | ".join(f"w3 = {w3}" for w3 in W3) + " |", "|---|" + "---:|" * len(W3)]
    for w, papers in zip(W12, TABLE_3):
        cells = []
        for w3, paper in zip(W3, papers):
            here = score(pairs, par(w=w, w3=w3), background, blur)
            cells.append(f"{here:.1f} ({'–' if paper is None else paper})")
        lines.append(f"| {w} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder in VOC layout")
    parser.add_argument("--cams", choices=("coarse", "imagenet"), default="coarse", help="of masks, or of a network")
    parser.add_argument("--split", nargs="+", help=f"default: train_aug; of --cams imagenet {' '.join(SPLITS)}")
    parser.add_argument("--background", type=float, default=0.45, help="score of the background channel")
    parser.add_argument("--blur", type=float, default=4.5, help="deviation in cells of the 1/16 grid")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file as well")
    parser.add_argument("--out-folder", type=Path, help="of --cams imagenet: for real_cams.json, .csv, .png")
    options = parser.parse_args(arguments)
    real = options.cams == "imagenet"
    splits = options.split or (SPLITS if real else ("train_aug",))
    pairs = [pair for split in splits for pair in load(options.root, split)]
    if real:
        text = report(pairs, REAL_ROWS, options.out_folder)
    else:
        text = tables(pairs, options.background, options.blur)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
