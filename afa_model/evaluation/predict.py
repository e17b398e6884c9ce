"""Prediction: label PNGs and one explaining panel for each photograph given."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..conventions import require
from ..data.files import files_below, made_here, write_label
from ..data.image_labels import multi_hot
from ..data.photographs import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Exif,
    PhotographError,
    is_image_name,
    opened,
    read_photograph,
    sizes,
)
from ..data.transforms import normalize
from ..errors import DataError, reason
from ..labels.evidence import MapSettings
from ..labels.kinds import kinds_of
from ..labels.label_maps import LabelMaps, label_maps_of_several
from ..labels.settings import LabelSettings
from ..pictures.overlays import thumbnail
from ..pictures.panels import head_weights_figure, peak_of, prediction_panel, save
from ..runtime.processes import laid_out
from ..runtime.progress import progress, several
from ..runtime.writing import writable_folder


@dataclass
class PredictSettings(MapSettings):
    """How photographs are labelled.

    Args:
        labels: names of the classes that are in the photographs, such as cat,dog; None takes those the
            classifier finds: the ones it gives more than 0.5, or at least the likeliest.
        crf: the label is the segmentation after the dense CRF that dense_crf describes. It takes seconds for each
            photograph.
        affinity_at: the pixel Y,X whose affinity is drawn; None takes the CAM's peak.
        panels: also draw a panel for each photograph.
        batch: photographs taken together. Those of them that go through the networks in the same size do so at once,
            which a GPU does faster; labels are those of 1 but for roundings.
        exif: turn photographs as their EXIF orientation says (apply), or leave them as they are stored (ignore).
        max_pixels: refuse photographs of more pixels than this; null refuses none.
        progress: show a progress bar on a terminal.
    """

    labels: tuple[str, ...] | str | None = None
    crf: bool = False
    affinity_at: tuple[int, int] | str | None = None
    panels: bool = True
    batch: int = 1
    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int | None = MAX_PIXELS
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exif not in ("apply", "ignore"):
            raise ValueError(f"exif: expected apply or ignore, got {self.exif!r}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels: expected at least 1 or null, got {self.max_pixels}")
        require(self.batch >= 1, "batch", "at least 1 photograph", self.batch)
        if isinstance(self.labels, str):
            self.labels = tuple(name.strip() for name in self.labels.split(",") if name.strip())
        if isinstance(self.affinity_at, str):
            try:
                y, x = self.affinity_at.split(",")
                self.affinity_at = int(y), int(x)
            except ValueError:
                raise ValueError(
                    f"affinity_at: expected a pixel Y,X such as 120,200, got {self.affinity_at!r}"
                ) from None


@dataclass(frozen=True)
class Prediction:
    """What became of one photograph.

    Attributes:
        image: the photograph's file.
        label: the label PNG (mode P, raw class index, VOC palette), or None for one that could not be read.
        panel: the panel, or None.
        found: (class name, classifier's score in 0..1) of the classes taken as present, likeliest first.
        problem: why there is no label; None where there is one.
    """

    image: Path
    label: Path | None
    panel: Path | None = None
    found: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


def predict(
    model: nn.Module,
    images: Iterable[str | Path],
    out: str | Path,
    class_names: Sequence[str],
    settings: PredictSettings | None = None,
    how: LabelSettings | None = None,
) -> list[Prediction]:
    """Write ``<out>/<name>.png`` (the label) and ``<out>/<name>_panel.png`` for each photograph.

    The label is the segmentation, after a dense CRF if the settings say so; a model without a decoder (CNN baseline)
    gives its refined CAM instead. The panel shows photograph, CAM, affinity of a point, pseudo-label (random walk and
    PAR) and prediction. One that cannot be read does not keep the others from being labelled.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA` on any device, in any mode (left as it was).
        images: photographs, folders of them (with sub-folders, which ``out`` then has too), or patterns such as
            ``photos/*.jpg``.
        out: folder to write into; made if need be.
        class_names: K names, background first.
        settings: which classes, in which sizes, what is drawn.
        how: pixel labels are made from the CAM.

    Returns:
        What became of each photograph, in their order.

    Raises:
        DataError: files that do not exist and folders without a photograph, all of them, before anything is written;
            files of which none is a photograph.
        ValueError: unknown names in ``labels``, or ``affinity_at`` outside a photograph or without attention.
    """
    settings, how = settings or PredictSettings(), how or LabelSettings()
    if len(class_names) != model.num_classes:
        raise ValueError(
            f"class_names: expected the model's {model.num_classes} names, got {len(class_names)}"
        )
    cls_labels = None if settings.labels is None else labels_named(settings.labels, class_names)
    if settings.affinity_at is not None and not model.has_affinity:
        raise ValueError(
            f"affinity_at: the backbone {model.backbone} has no attention, so no affinity either"
        )
    if settings.crf and not model.has_affinity:
        raise ValueError(f"crf: the backbone {model.backbone} has no decoder, so no segmentation either")
    kinds = kinds_of(model, crf=settings.crf)
    out = Path(out).expanduser()
    targets = _targets(photos(images, out), out, settings.panels)
    if settings.affinity_at is not None:
        _check_point(targets, settings.affinity_at, settings)
    writable_folder(out, "out")

    def look(readable: Sequence[Tensor]) -> Iterator[LabelMaps]:
        images, given = [normalize(photo) for photo in readable], [cls_labels] * len(readable)
        return label_maps_of_several(model, images, settings, how, given, kinds)

    done: list[Prediction] = []
    with laid_out(model, settings.channels_last):
        for some in several(progress(list(targets.items()), "predicting", show=settings.progress), settings.batch):
            done += _predict(dict(some), look, class_names, settings)
    if all(item.label is None for item in done):
        raise DataError("images: none can be labelled", [item.problem for item in done])
    return done


def _predict(
    targets: Mapping[Path, Path],
    look: Callable[[Sequence[Tensor]], Iterator[LabelMaps]],
    class_names: Sequence[str],
    settings: PredictSettings,
) -> Iterator[Prediction]:
    """Photographs, each with its label's file, that are taken together. ``look`` gives the label maps of those that can
    be read, uint8 [3, H, W], in their order.
    """
    readable, problems = {}, {}
    for path in targets:
        try:
            pixels = read_photograph(path, settings.exif, max_pixels=settings.max_pixels)
            readable[path] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        except PhotographError as error:
            problems[path] = str(error)
    seen = look(list(readable.values()))
    for path, target in targets.items():
        if path in problems:
            yield Prediction(path, None, problem=problems[path])
            continue
        maps = next(seen)
        try:
            made = _write(path, target, readable[path], maps, class_names, settings)
        except OSError as error:
            made = Prediction(path, None, problem=f"{path}: not all of it can be written ({reason(error)})")
        yield made


def _write(
    path: Path,
    target: Path,
    photo: Tensor,
    maps: LabelMaps,
    class_names: Sequence[str],
    settings: PredictSettings,
) -> Prediction:
    probabilities, present = maps.probabilities.cpu(), maps.present
    prediction = maps.labels.get("segmentation_crf", maps.labels.get("segmentation"))
    pseudo_label = maps.labels["refined_cam" if maps.affinity is None else "refined_random_walk"].cpu()
    prediction = None if prediction is None else prediction.cpu()
    write_label(target, pseudo_label if prediction is None else prediction)
    panel = None
    if settings.panels:
        cam, size = maps.cam.cpu(), photo.shape[1:]
        point = settings.affinity_at or peak_of(cam, present, size)
        figure = prediction_panel(
            thumbnail(photo),
            title=path.name,
            cam=cam,
            affinity=None if maps.affinity is None else maps.affinity.float().cpu(),
            point=point,
            size=size,
            pseudo_label=thumbnail(pseudo_label),
            prediction=None if prediction is None else thumbnail(prediction),
            class_names=class_names,
            probabilities=probabilities,
            present=present,
        )
        panel = save(figure, _panel_of(target))
    found = sorted(
        ((class_names[i], float(probabilities[i - 1])) for i in present), key=lambda item: -item[1]
    )
    return Prediction(path, target, panel, tuple(found))


def draw_head_weights(model: nn.Module, path: str | Path, title: str = "") -> Path:
    """Write a PNG of how much each attention head counts in the model's affinity; its folder is made if need be.

    Raises:
        ValueError: a model without attention.
    """
    model.require_attention("head_weights")
    return save(head_weights_figure(*model.affinity_head(), model.abilities.affinity_blocks, title), path)


def photos(images: Iterable[str | Path], out: str | Path | None = None) -> dict[Path, Path]:
    """The photographs among ``images``, each once and in order -> the path of each from where it was asked for.

    A folder gives those in it and in its sub-folders (but for ``out``), sorted; a pattern what it matches.

    Raises:
        DataError: naming all that do not exist and all folders and patterns without a photograph.
    """
    found: dict[Path, Path] = {}
    problems = []
    images = {os.path.abspath(os.path.expanduser(given)): given for given in reversed(list(images))}
    for given in map(str, reversed(images.values())):
        path = Path(given).expanduser()
        if path.is_dir():
            inside = _photos_under(path, out)
            if not inside:
                listed = ", ".join(IMAGE_SUFFIXES[:5])
                problems.append(f"{path}: no photograph ({listed}, ...) in this folder or below it")
            for file in inside:
                found.setdefault(file, file.relative_to(path))
        elif path.is_file():
            found.setdefault(path, Path(path.name))
        elif path.exists():
            problems.append(f"{path}: neither a file nor a folder")
        elif glob.has_magic(given):
            matching = sorted(map(Path, glob.glob(str(path), recursive=True)))
            matching = [file for file in matching if file.is_file() and is_image_name(file)]
            if not matching:
                problems.append(f"{path}: no photograph matches this pattern")
            for file in matching:
                found.setdefault(file, Path(file.name))
        else:
            problems.append(f"{path}: not found")
    if problems:
        raise DataError("images: some cannot be read", problems)
    if not found:
        raise DataError("images: none given")
    return found


def _photos_under(folder: Path, out: str | Path | None) -> list[Path]:
    """Without hidden files and folders, ``out``, and labels and panels, wherever earlier predictions put them."""
    found = []
    for here, names in files_below(folder, () if out is None else (Path(out),)):
        paths = [here / name for name in names if is_image_name(name) and not name.startswith(".")]
        paths = [path for path in paths if path.is_file() or not path.exists()]  # a link to nothing is told of later
        found += [path for path in paths if not (path.suffix.lower() == ".png" and made_here(path))]
    return sorted(found)


def _check_point(paths: Iterable[Path], point: tuple[int, int], settings: PredictSettings) -> None:
    """Every photograph that can be opened holds the pixel ``point`` (y, x), before the first one is worked on."""
    for path, (height, width) in sizes_of(paths, settings.exif, settings.max_pixels):
        if not (0 <= point[0] < height and 0 <= point[1] < width):
            raise ValueError(
                f"affinity_at: expected a pixel Y,X inside {path.name} (0..{height - 1}, 0..{width - 1}),"
                f" got {point[0]},{point[1]}"
            )


def sizes_of(
    paths: Iterable[Path], exif: Exif = "apply", max_pixels: int | None = MAX_PIXELS
) -> Iterator[tuple[Path, tuple[int, int]]]:
    """(height, width) of each photograph that can be opened; the others will be named when they are read."""
    for path in paths:
        try:
            with opened(path, max_pixels) as image:
                width, height = sizes(image)[exif == "apply"]
        except PhotographError:
            continue
        yield path, (height, width)


def _targets(found: Mapping[Path, Path], out: Path, panels: bool) -> dict[Path, Path]:
    """Where each label goes. Photographs of one folder that differ in their ending only keep it: ``a.bmp.png``.

    Raises:
        DataError: two would share a file, or one would be overwritten.
    """
    alike = Counter((path.parent, path.stem) for path in found)
    targets = {}
    for path, name in found.items():
        called = name.name if alike[path.parent, path.stem] > 1 else name.stem
        targets[path] = out / name.with_name(f"{called}.png")
    owners: dict[Path, Path] = {path.resolve(): path for path in found}
    problems = []
    for path, target in targets.items():
        for file in (target, _panel_of(target))[: 1 + panels]:
            if file.resolve() in owners:
                problems.append(f"{file}: for {path}, but it belongs to {owners[file.resolve()]}")
            owners[file.resolve()] = path
    if problems:
        raise DataError(
            "out: files would overwrite each other; choose another folder or other names", problems
        )
    return targets


def _panel_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}_panel.png")


def labels_named(labels: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Multi-hot [K - 1] of the classes named.

    Raises:
        ValueError: unknown names, or none.
    """
    unknown = [name for name in labels if name not in class_names[1:]]
    if unknown or not labels:
        what = ", ".join(map(repr, unknown)) or "none given"
        raise ValueError(f"labels: {what}; expected some of {', '.join(class_names[1:])}")
    return multi_hot([list(class_names).index(name) for name in labels], len(class_names))
