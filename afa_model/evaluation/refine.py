"""Refinement of label maps and class scores that are there as files, whoever made them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..conventions import IGNORE, require, resize, under
from ..data.files import files_below, read_label, write_label
from ..data.photographs import MAX_PIXELS, read_photograph
from ..data.score_files import SCORE_SUFFIXES, read_scores, write_scores
from ..errors import AfaError, ConfigError, DataError, reason
from ..labels.crf import CrfSettings, crf_size, shrunk
from ..labels.large import PIXELS, is_large, strongest
from ..labels.refinement import refine
from ..labels.settings import LabelSettings
from ..runtime.processes import share_of
from ..runtime.progress import told
from ..runtime.writing import refuse_to_mix, whole, writable_folder
from .predict import photos

RECORD = "refine.json"  # in the folder written to: what its files were made by


@dataclass
class RefineSettings:
    """How masks are refined.

    Args:
        method: the dense CRF (crf), PAR (par) or PAMR (pamr).
        dilations: distances of the neighbours of par and pamr in pixels.
        num_iter: their iterations.
        dense_crf: what crf is like.
        gt_prob: probability that a label in a PNG is right, its other classes sharing the rest; above 0 and below 1.
        fill_unknown: give pixels of label 255 a class, too; else they stay unknown.
        has_background: number 0 of CAMs is the background; else it is the first class after it, and the background is
            made of bkg_score or power.
        bkg_score: CAM value in 0..1 that the background has everywhere.
        power: the background is (1 - largest CAM value) to this power in the place of bkg_score.
        soft: also write the refined scores, as NAME.npz with classes [C] and scores float16 [C, H, W].
        exif: turn photographs as their EXIF orientation says (apply), or leave them as they are stored (ignore).
        max_pixels: refuse photographs of more pixels than this; null refuses none.
        shard: I/N: refine only the I-th of N shares of the files, I in 1..N; under torchrun each process takes its own.
        progress: show a progress bar on a terminal.
    """

    method: Literal["crf", "par", "pamr"] = "crf"
    dilations: tuple[int, ...] = LabelSettings.dilations
    num_iter: int = LabelSettings.num_iter
    dense_crf: CrfSettings = field(default_factory=CrfSettings)
    gt_prob: float = 0.7
    fill_unknown: bool = False
    has_background: bool = False
    bkg_score: float = LabelSettings.bkg_score
    power: float | None = None
    soft: bool = False
    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int | None = MAX_PIXELS
    shard: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.method in ("crf", "par", "pamr"), "method", "crf, par or pamr", self.method)
        require(self.exif in ("apply", "ignore"), "exif", "apply or ignore", self.exif)
        require(0 < self.gt_prob < 1, "gt_prob", "a probability above 0 and below 1", self.gt_prob)
        require(self.power is None or 0 < self.power < 1e6, "power", "a positive number", self.power)
        enough = self.max_pixels is None or self.max_pixels >= 1
        require(enough, "max_pixels", "at least 1 or null", self.max_pixels)
        with under("dense_crf"):
            self.dense_crf.__post_init__()
        self.how()
        self.share()

    def how(self) -> LabelSettings:
        """The refinement, as labels name it."""
        by = self.dilations, self.num_iter, self.dense_crf, self.bkg_score
        names = "dilations", "num_iter", "dense_crf", "bkg_score"
        return LabelSettings(refinement=self.method, **dict(zip(names, by)))

    def share(self) -> tuple[int, int]:
        """Which share of the files, from 0, of how many."""
        return share_of(self.shard)

    def record(self) -> dict[str, Any]:
        """What decides how the files look."""
        values = asdict(self)
        unused = ("dilations", "num_iter") if self.method == "crf" else ("dense_crf",)
        for name in (*unused, "soft", "shard", "progress", "max_pixels"):
            del values[name]
        return json.loads(json.dumps(values))


@dataclass
class Refinement:
    """What became of the masks of one share.

    Attributes:
        done: masks refined now.
        skipped: those that were finished before.
        problems: why the others are not, a line for each.
        seconds: that it took.
    """

    done: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def refine_files(
    images: str | Path,
    masks: str | Path,
    out: str | Path,
    settings: RefineSettings | None = None,
    device: str | torch.device = "cpu",
) -> Refinement:
    """Refine each mask of a folder along the edges of its photograph: ``<out>/<name>.png``, and maybe ``.npz``.

    The photograph of ``masks/a/x.npy`` is ``images/a/x`` of any ending, or the one ``x`` anywhere below ``images``. Of
    scores and a label of one name the scores are taken. Files that are finished, and not older than their mask, are
    left alone; each appears when it is whole.

    Args:
        images: folder of photographs, with its sub-folders.
        masks: folder of class scores (``.npy``, ``.npz``; see score_files.py), of any size, and of label PNGs of the
            photographs' size, with its sub-folders.
        out: folder to write into; made if need be.

    Raises:
        ConfigError: ``out`` cannot be written into, or holds files that were made otherwise.
        DataError: there are no masks or no photographs, or none of the masks can be refined.
    """
    settings = settings or RefineSettings()
    masks, out = Path(masks).expanduser(), Path(out).expanduser()
    known = _Photographs(images, out)
    found = _masks(masks, out)
    writable_folder(out, "out")
    _record(out, {"images": os.path.abspath(known.folder), "masks": os.path.abspath(masks), **settings.record()})
    index, count = settings.share()
    share = found[index::count]
    result, start = Refinement(), time.monotonic()
    for name in told(share, "refining", lambda: result.done, settings.progress):
        target = (out / name).with_suffix(".png")
        try:
            if _finished(masks / name, target, settings.soft):
                result.skipped += 1
                continue
            _refine_one(known.of(name), masks / name, target, settings, device)
            result.done += 1
        except AfaError as error:
            result.problems.append(str(error))
        except OSError as error:
            result.problems.append(f"{target}: cannot be written ({reason(error)})")
    result.seconds = time.monotonic() - start
    if share and len(result.problems) == len(share):
        raise DataError("masks: none can be refined", result.problems)
    return result


def _refine_one(photo: Path, mask: Path, target: Path, settings: RefineSettings, device: str | torch.device) -> None:
    pixels = read_photograph(photo, settings.exif, max_pixels=settings.max_pixels)
    images01 = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device).float() / 255
    size = tuple(images01.shape[2:])
    unknown = None
    if mask.suffix.lower() in SCORE_SUFFIXES:
        numbers, maps = _of_scores(mask, size, settings)
    else:
        numbers, maps, unknown = _of_label(mask, photo, size, settings)
    if not numbers:
        label, refined = torch.full(size, IGNORE, dtype=torch.uint8), torch.zeros(0, *size)
    else:
        refined = refined_scores(images01, maps.to(device), len(numbers), settings)
        label = torch.tensor(numbers, dtype=torch.uint8)[strongest(refined[0], size).cpu().int()]
        refined = refined[0].cpu()
    if unknown is not None and not settings.fill_unknown:
        label[unknown] = IGNORE
    if settings.soft:
        with whole(target.with_suffix(".npz")) as path:
            write_scores(path, numbers, refined if not numbers else resize(refined[None], size)[0])
    with whole(target) as path:  # last: where it is, all is
        write_label(path, label)


def refined_scores(images01: Tensor, maps: Tensor, classes: int, settings: RefineSettings) -> Tensor:
    """Class scores after refinement at the photograph's own size, or what of it memory allows.

    images01: [1, 3, H, W] in 0..1. maps: [1, C, h, w] in 0..1, of all ``classes`` or of all but the background, which
    is then made; what is refined is each one's share of their sum -> [1, classes, h', w'].
    """
    how, size = settings.how(), tuple(images01.shape[2:])
    if settings.method == "crf":
        working = crf_size(size, classes)
    elif is_large(size):
        scale = (PIXELS / (size[0] * size[1])) ** 0.5
        working = tuple(max(1, int(side * scale)) for side in size)
        images01 = shrunk(images01, working)
    else:
        working = size
    maps = resize(maps, working) if maps.shape[1] else maps.new_zeros(1, 0, *working)
    if maps.shape[1] < classes:
        highest = maps.amax(1, keepdim=True) if maps.shape[1] else maps.new_zeros(1, 1, *working)
        constant = torch.full_like(highest, settings.bkg_score)
        maps = torch.cat([constant if settings.power is None else (1 - highest) ** settings.power, maps], 1)
    # what no class claims is anyone's
    total = maps.sum(1, keepdim=True)
    maps = torch.where(total > 0, maps / total.clamp_min(torch.finfo(maps.dtype).tiny), 1 / classes)
    return refine(images01, maps, torch.ones(1, classes, dtype=torch.bool, device=maps.device), how)


def _of_scores(mask: Path, size: tuple[int, int], settings: RefineSettings) -> tuple[tuple[int, ...], Tensor]:
    """Classes, the background first, and their maps [1, C, h, w]; without the background's where that must be made."""
    scores = read_scores(mask)
    if scores.maps.shape[1:] == size[::-1] and size[0] != size[1]:
        raise DataError(
            f"{mask}: {size[0]}x{size[1]} pixels, but its photograph has {size[1]}x{size[0]}; is one of them turned"
            " (--exif ignore leaves photographs as they are stored)?"
        )
    with_background = settings.has_background if scores.with_background is None else scores.with_background
    shown = scores.maps.flatten(1).amax(1) > 0
    if with_background:
        if scores.numbers[0] != 0:
            raise DataError(f"{mask}: no class 0, which is to be the background")
        shown[0] = True
    numbers = [number for number, here in zip(scores.numbers, shown.tolist()) if here]
    maps = scores.maps[shown][None]
    return tuple(numbers) if with_background else (0, *(number + 1 for number in numbers)), maps


def _of_label(
    mask: Path, photo: Path, size: tuple[int, int], settings: RefineSettings
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Classes that occur, what their probabilities [1, C, H, W] are a share of, and where the label says nothing [H, W]
    bool: there all have the same.
    """
    try:
        label = read_label(mask)
    except ValueError as error:
        raise DataError(str(error) if str(mask) in str(error) else f"{mask}: {error}") from None
    if tuple(label.shape) != size:
        turned = "; is one of them turned (--exif ignore)?" if tuple(label.shape) == size[::-1] else ""
        raise DataError(
            f"{mask}: {label.shape[1]}x{label.shape[0]} pixels, but the photograph {photo} has"
            f" {size[1]}x{size[0]}{turned}"
        )
    numbers, maps = probabilities_of(label, settings.gt_prob)
    if numbers and numbers[-1] > IGNORE:
        raise DataError(f"{mask}: expected labels 0..{IGNORE}, got {numbers[-1]}")
    return numbers, maps, label == IGNORE


def probabilities_of(label: Tensor, gt_prob: float) -> tuple[tuple[int, ...], Tensor]:
    """The classes that occur in a label, int64 [H, W], and what their probabilities float32 [1, C, H, W] are a share
    of: where the label says a class that has ``gt_prob`` and the others share the rest, where it says 255 all have the
    same.
    """
    numbers = tuple(label[label != IGNORE].unique().tolist())
    others = (1 - gt_prob) / max(len(numbers) - 1, 1)
    of_number = label == torch.tensor(numbers, dtype=label.dtype)[:, None, None]
    return numbers, torch.where(of_number, gt_prob, others)[None]


class _Photographs:
    """The photographs of a folder by the path of a mask."""

    def __init__(self, folder: str | Path, out: Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"images: {self.folder} is not a folder")
        self._by_path: dict[Path, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path, name in photos([self.folder], out).items():
            self._by_path.setdefault(name.with_suffix(""), []).append(path)
            self._by_stem.setdefault(name.stem, []).append(path)

    def of(self, name: Path) -> Path:
        """
        Raises:
            DataError: there is none, or one of several.
        """
        found = self._by_path.get(name.with_suffix("")) or self._by_stem.get(name.stem, [])
        if len(found) != 1:
            told = f"several photographs: {', '.join(map(str, found[:3]))}" if found else f"none in {self.folder}"
            raise DataError(f"{name}: the photograph {name.with_suffix('')} is needed, there is {told}")
        return found[0]


def _masks(folder: Path, out: Path) -> list[Path]:
    """The masks of a folder, by their paths in it, sorted; without ``out``, hidden files and predictions' panels.

    Raises:
        ConfigError, DataError: there is none, two would share a label, or ``out`` is their folder.
    """
    if not folder.is_dir():
        raise DataError(f"masks: {folder} is not a folder")
    if folder.resolve() == out.resolve():
        raise ConfigError(f"out: {out} is the folder of the masks, which would be overwritten")
    found: list[Path] = []
    for here, files in files_below(folder, (out,)):
        suffixes = (".png", *SCORE_SUFFIXES)
        names = [name for name in files if name.lower().endswith(suffixes) and not name.startswith(".")]
        panels = {f"{Path(name).stem}_panel.png" for name in names}
        names = [name for name in names if name not in panels]
        found += [Path(here, name).relative_to(folder) for name in names]
    if not found:
        raise DataError(f"masks: no .npy, .npz or .png in {folder} or below it")
    scored = {name.with_suffix("") for name in found if name.suffix.lower() in SCORE_SUFFIXES}
    found = [name for name in found if name.suffix.lower() in SCORE_SUFFIXES or name.with_suffix("") not in scored]
    alike = Counter(name.with_suffix("") for name in found)
    problems = [f"{name}: {count} files of this name" for name, count in sorted(alike.items()) if count > 1]
    if problems:
        raise DataError("masks: files would share a label", problems)
    return sorted(found)


def _record(out: Path, values: Mapping[str, Any]) -> None:
    """Keep what the files are made by, and refuse to mix them with files that were made otherwise."""
    path = out / RECORD
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        with whole(path) as file:
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {path} cannot be read ({reason(error)}); remove it to refine all of it anew") from None
    refuse_to_mix(out, before, values, "masks that were refined otherwise")


def _finished(mask: Path, target: Path, soft: bool) -> bool:
    made = [target, target.with_suffix(".npz")][: 1 + soft]
    try:
        return min(path.stat().st_mtime for path in made) >= mask.stat().st_mtime
    except FileNotFoundError:
        return False
