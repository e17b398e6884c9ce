"""Why refinement gains on ImageNet CAMs what it gains: each cause to be suspected, taken away or turned by itself.

python benchmarks/real_cams_why.py VOC_FOLDER [--only seeds reach peaks settings scales] [--out-folder FOLDER]

- seeds: other CAMs of the same photographs, from real to ideal: without false alarms, with what was missed, of masks.
- reach: how far from the masks' boundaries wrong pixels are; what would be gained if all so near were put right.
- peaks: how much of the objects the CAMs cover, and how many pixels are undecided.
- settings: resolution, iterations, power of the CAM, sharpness of the softmax.
- scales: the CAM's own.

Every mIoU is at the best of BACKGROUNDS, found anew for each row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import as_the_command  # noqa: F401
import torch
from boundary_scores import contour, near, trimap
from quality_refinement import by_name, coarse_scores, load, par
from real_cams import SPLITS, photos_of
from refined_labels import Photo, Refine, Sweep, confusion_of, miou, refined_labels, sweep
from torch import Tensor

from afa_kernels.ops.par import DILATIONS
from afa_model.conventions import IGNORE, resize
from afa_model.runtime.progress import progress
from afa_model.runtime.writing import whole, writable_folder

BACKGROUNDS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
BLUR = 4.5  # of quality_refinement.py's coarse masks
CORE = 16  # pixels that a mask is eroded by
DISTANCES = (5, 10, 20, 40, 80)

REFINEMENTS: dict[str, Refine] = {"CAM": by_name("none"), "PAR": par(), "CRF": by_name("crf")}

Row = dict[str, float | str]
Change = Callable[[Photo], Tensor]  # another CAM [1, S, h, w] of the same photograph


# --- seeds ---


def objects(photo: Photo) -> Tensor:
    """bool [1, S, H, W]: where the mask has each class."""
    return photo.mask == photo.classes[None, :, None, None]


def core(region: Tensor, pixels: int = CORE) -> Tensor:
    """bool [H, W] without what is at most ``pixels`` from its contour; all of it where nothing would be left."""
    left = region & ~near(contour(region), pixels)
    return left if left.any() else region


def cores(photo: Photo) -> Tensor:
    """float [1, S, H, W]: 1 in the core of each class's region, 0 elsewhere."""
    return torch.stack([core(region) for region in objects(photo)[0]])[None].float()


def blurred(photo: Photo) -> Tensor:
    """The coarse masks of quality_refinement.py."""
    return coarse_scores(photo.mask, 1.0, BLUR)[:, photo.classes]


SEEDS: dict[str, Change] = {
    "ImageNet CAM": lambda photo: photo.cam,
    "without false alarms (0 outside the object and void)": lambda photo: (
        photo.cam * (objects(photo) | (photo.mask == IGNORE))
    ),
    f"with the objects' cores (1 from {CORE} pixels inside)": lambda photo: torch.maximum(photo.cam, cores(photo)),
    "masks, blurred as CAMs are": blurred,
    f"masks' cores alone (from {CORE} pixels inside)": cores,
}


def with_cam(photos: Sequence[Photo], change: Change) -> list[Photo]:
    return [photo._replace(cam=resize(change(photo), photo.mask.shape)) for photo in photos]


def measured(title: str, photos: Sequence[Photo], refine: Refine, power: float = 1.0, **how: float) -> Sweep:
    """With CAM and background to the power of ``power``, which leaves labels that are not refined as they were."""
    if power != 1:
        photos = with_cam(photos, lambda photo: photo.cam**power)
    backgrounds = [background**power for background in BACKGROUNDS]
    return sweep(photos, refine, backgrounds, **how, watch=partial(progress, title=title, total=len(photos)))


def seeds(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    for name, change in SEEDS.items():
        changed = with_cam(photos, change)
        row: Row = {"seed": name}
        for title, refine in REFINEMENTS.items():
            row[title] = max(measured(f"{name}, {title}", changed, refine).mious)
        yield row


# --- reach ---


def reach(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    """At the best background score: of the wrong pixels the share within a distance; and mIoU if those were right."""
    for name in ("ImageNet CAM", "masks, blurred as CAMs are"):
        changed, refine = with_cam(photos, SEEDS[name]), REFINEMENTS["CAM"]
        swept = measured(name, changed, refine)
        row: Row = {"labels": name, "mIoU": max(swept.mious)}
        yield row | mended(changed, refine, swept.backgrounds[swept.best])


def mended(photos: Sequence[Photo], refine: Refine, background: float) -> Row:
    wrong, counts = dict.fromkeys((0, *DISTANCES), 0), dict.fromkeys(DISTANCES, torch.zeros((), dtype=torch.int64))
    for photo in photos:
        (label,), mask = refined_labels(photo.image, photo.scores(background), photo.classes, refine), photo.mask
        errors = (label != mask) & (mask != IGNORE)
        wrong[0] += int(errors.sum())
        for pixels in DISTANCES:
            band = trimap(mask, pixels)
            wrong[pixels] += int((errors & band).sum())
            counts[pixels] = counts[pixels] + confusion_of(torch.where(band, mask.long(), label), mask)
    shares = {f"errors within {pixels} px (%)": 100 * wrong[pixels] / max(wrong[0], 1) for pixels in DISTANCES}
    return shares | {f"mIoU if those were right, {pixels} px": miou(counts[pixels]) for pixels in DISTANCES}


# --- peaks ---


def peaks(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    """Shares in per cent, of pixels that are not void, at the background score that is best without refinement."""
    for name, change in (*SEEDS.items(), ("ImageNet CAM, square root", lambda photo: photo.cam.sqrt())):
        changed = with_cam(photos, change)
        swept = measured(name, changed, REFINEMENTS["CAM"])
        background = swept.backgrounds[swept.best]
        yield {"seed": name, "background score": background} | coverage(changed, background)


def coverage(photos: Sequence[Photo], background: float) -> Row:
    of_objects, high, missed, of_ground, alarms, known, close = (0,) * 7
    for photo in photos:
        own = (photo.cam * objects(photo)).amax((0, 1))  # the right class's CAM
        highest = photo.cam.amax((0, 1))
        on, ground = objects(photo).any(1)[0], photo.mask == 0
        of_objects, of_ground = of_objects + int(on.sum()), of_ground + int(ground.sum())
        high += int((on & (own > 0.5)).sum())
        missed += int((on & (own <= background)).sum())
        alarms += int((ground & (highest > background)).sum())
        known += int((photo.mask != IGNORE).sum())
        close += int(((photo.mask != IGNORE) & ((highest - background).abs() < 0.1)).sum())
    return {
        "objects' pixels above 0.5 (%)": 100 * high / of_objects,
        "objects' pixels below the background (%)": 100 * missed / of_objects,
        "background's pixels above it (%)": 100 * alarms / of_ground,
        "pixels within 0.1 of it (%)": 100 * close / known,
    }


# --- settings ---


def settings(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    for name, refine, how in [
        *((f"PAR, {number} iterations", par(num_iter=number), {}) for number in (5, 15, 60)),
        ("PAR, softmax of 10 x the scores", par(), {"sharpness": 10.0}),
        ("PAR, square root of the CAM", par(), {"power": 0.5}),
        ("CRF, softmax of 10 x the scores", by_name("crf"), {"sharpness": 10.0}),
        ("PAR at full resolution, dilations doubled", par([2 * d for d in DILATIONS]), {"scale": 1.0}),
        ("PAR at full resolution", par(), {"scale": 1.0}),
        ("PAR, square of the CAM", par(), {"power": 2.0}),
        ("CRF, softmax of 4 x the scores", by_name("crf"), {"sharpness": 4.0}),
    ]:
        swept = measured(name, photos, refine, **how)
        yield {"setting": name, "mIoU": max(swept.mious), "background score": swept.backgrounds[swept.best]}


# --- scales ---


def scales(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Row]:
    """The network learned photographs of 224 pixels: smaller scales show it objects as it knows them."""
    for chosen in ((0.5, 0.75, 1.0),):
        small = photos_of(pairs, chosen)
        row: Row = {"scales": ", ".join(map(str, chosen))}
        yield row | {title: max(measured(title, small, refine).mious) for title, refine in REFINEMENTS.items()}


EXPERIMENTS = {"seeds": seeds, "reach": reach, "peaks": peaks, "settings": settings, "scales": scales}


def markdown(rows: Sequence[Row]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        lines.append("| " + " | ".join(map(_cell, row.values())) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value, 3)


def run(photos: Sequence[Photo], pairs: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], folder: Path | None):
    """Print a table for each experiment, and keep what is known so far in ``real_cams_why.json``."""
    path, known = None, {}
    if folder is not None:
        path = writable_folder(folder, "out-folder") / "real_cams_why.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        rows: list[Row] = []
        for row in EXPERIMENTS[name](photos, pairs):
            rows.append(row)
            known[name] = [{key: _rounded(value) for key, value in row.items()} for row in rows]
            if path is not None:
                with whole(path) as file:
                    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(f"{name}\n\n{markdown(rows)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder in VOC layout")
    parser.add_argument("--split", nargs="+", default=list(SPLITS))
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument("--out-folder", type=Path, help="for real_cams_why.json")
    options = parser.parse_args(arguments)
    pairs = [pair for split in options.split for pair in load(options.root, split)]
    run(photos_of(pairs), pairs, options.only, options.out_folder)


if __name__ == "__main__":
    main()
