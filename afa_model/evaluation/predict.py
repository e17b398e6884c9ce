"""Prediction: label PNGs and one explaining panel for each photograph given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from torch import Tensor, nn

from ..data.files import IMAGE_SUFFIXES, read_photo, write_label
from ..data.image_labels import multi_hot
from ..data.transforms import normalize
from ..errors import DataError
from ..labels.label_maps import LabelMaps, MapSettings, label_maps
from ..labels.settings import LabelSettings
from ..pictures.overlays import photo_of
from ..pictures.panels import head_weights_figure, peak_of, prediction_panel, save
from ..runtime.progress import progress


@dataclass
class PredictSettings(MapSettings):
    """How photographs are labelled.

    Args:
        labels: names of the classes that are in the photographs, such as cat,dog; None takes those the
            classifier finds: the ones it gives more than 0.5, or at least the likeliest.
        affinity_at: the pixel Y,X whose affinity is drawn; None takes the CAM's peak.
        panels: also draw a panel for each photograph.
        progress: show a progress bar on a terminal.
    """

    labels: tuple[str, ...] | str | None = None
    affinity_at: tuple[int, int] | str | None = None
    panels: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """What was written for one photograph.

    Attributes:
        image: the photograph's file.
        label: the label PNG (mode P, raw class index, VOC palette).
        panel: the panel, or None.
        found: (class name, classifier's score in 0..1) of the classes taken as present, likeliest first.
    """

    image: Path
    label: Path
    panel: Path | None
    found: tuple[tuple[str, float], ...]


def predict(
    model: nn.Module,
    images: Iterable[str | Path],
    out: str | Path,
    class_names: Sequence[str],
    settings: PredictSettings | None = None,
    how: LabelSettings | None = None,
) -> list[Prediction]:
    """Write ``<out>/<name>.png`` (the label) and ``<out>/<name>_panel.png`` for each photograph.

    The label is the segmentation; a model without a decoder (CNN baseline) gives its refined CAM instead. The
    panel shows photograph, CAM, affinity of a point, pseudo-label (random walk and PAR) and prediction.
    Photographs are turned upright as their EXIF orientation says, and so are the labels.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA` on any device, in any mode (left as it was).
        images: photographs, or folders of them.
        out: folder to write into; made if need be.
        class_names: K names, background first.
        settings: which classes, in which sizes, what is drawn.
        how: pixel labels are made from the CAM.

    Raises:
        DataError: files that are missing or no photographs, all of them, before anything is written.
        ValueError: unknown names in ``labels``, or ``affinity_at`` outside a photograph or without attention.
    """
    settings, how = settings or PredictSettings(), how or LabelSettings()
    if len(class_names) != model.num_classes:
        raise ValueError(
            f"class_names: expected the model's {model.num_classes} names, got {len(class_names)}"
        )
    cls_labels = None if settings.labels is None else _known(settings.labels, class_names)
    if settings.affinity_at is not None and not model.has_affinity:
        raise ValueError(
            f"affinity_at: the backbone {model.backbone} has no attention, so no affinity either"
        )
    paths = photos(images)
    _check_photos(paths, settings.affinity_at)
    targets = _targets(paths, Path(out))
    done = []
    for path, target in progress(list(zip(paths, targets)), "predicting", show=settings.progress):
        try:
            photo = read_photo(path, upright=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be decoded ({error})") from error
        maps = label_maps(model, normalize(photo), settings, how, cls_labels)
        done.append(_write(path, target, photo, maps, class_names, settings))
    return done


def _write(
    path: Path,
    target: Path,
    photo: Tensor,
    maps: LabelMaps,
    class_names: Sequence[str],
    settings: PredictSettings,
) -> Prediction:
    probabilities, present = maps.probabilities.cpu(), maps.present
    prediction = maps.labels.get("segmentation")
    pseudo_label = maps.labels["refined_cam" if maps.affinity is None else "refined_random_walk"].cpu()
    write_label(target, pseudo_label if prediction is None else prediction.cpu())
    panel = None
    if settings.panels:
        cam = maps.cam.cpu()
        figure = prediction_panel(
            photo_of(photo),
            title=path.name,
            cam=cam,
            affinity=None if maps.affinity is None else maps.affinity.float().cpu(),
            point=settings.affinity_at or peak_of(cam, present),
            pseudo_label=pseudo_label,
            prediction=None if prediction is None else prediction.cpu(),
            class_names=class_names,
            probabilities=probabilities,
            present=present,
        )
        panel = save(figure, target.with_name(f"{target.stem}_panel.png"))
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


def photos(images: Iterable[str | Path]) -> list[Path]:
    """The files among ``images`` and, sorted, the photographs in the folders among them, each once.

    Raises:
        DataError: naming all that do not exist and all folders without a photograph.
    """
    found: list[Path] = []
    problems = []
    for path in map(Path, images):
        inside = (
            sorted(file for file in path.iterdir() if file.suffix in IMAGE_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not path.exists():
            problems.append(f"{path}: not found")
        elif path.is_dir() and not inside:
            problems.append(f"{path}: no photograph ({', '.join(IMAGE_SUFFIXES[:3])}) in this folder")
        else:
            found += inside
    if problems:
        raise DataError("images: some cannot be read", problems)
    if not found:
        raise DataError("images: none given")
    return list(dict.fromkeys(found))


def _check_photos(paths: Sequence[Path], point: tuple[int, int] | None) -> None:
    """Every file is a photograph that holds the pixel ``point`` (y, x), before the first one is worked on."""
    problems = []
    for path in paths:
        try:
            with Image.open(path) as image:
                width, height = image.size
                if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # it will be turned by a quarter
                    width, height = height, width
        except OSError:
            problems.append(f"{path}: no photograph that can be decoded")
            continue
        if point is not None and not (0 <= point[0] < height and 0 <= point[1] < width):
            raise ValueError(
                f"affinity_at: expected a pixel Y,X inside {path.name} (0..{height - 1}, 0..{width - 1}),"
                f" got {point[0]},{point[1]}"
            )
    if problems:
        raise DataError("images: some cannot be read", problems)


def _targets(paths: Sequence[Path], out: Path) -> list[Path]:
    """Where each label goes; no two photographs may share a file, and none may be overwritten."""
    targets = [out / f"{path.stem}.png" for path in paths]
    owners: dict[Path, Path] = {path.resolve(): path for path in paths}
    problems = []
    for path, target in zip(paths, targets):
        for file in (target, target.with_name(f"{target.stem}_panel.png")):
            if file.resolve() in owners:
                problems.append(f"{file}: for {path}, but it belongs to {owners[file.resolve()]}")
            owners[file.resolve()] = path
    if problems:
        raise DataError(
            "out: files would overwrite each other; choose another folder or other names", problems
        )
    return targets


def _known(labels: Sequence[str], class_names: Sequence[str]) -> Tensor:
    unknown = [name for name in labels if name not in class_names[1:]]
    if unknown or not labels:
        what = ", ".join(map(repr, unknown)) or "none given"
        raise ValueError(f"labels: {what}; expected some of {', '.join(class_names[1:])}")
    return multi_hot([list(class_names).index(name) for name in labels], len(class_names))
