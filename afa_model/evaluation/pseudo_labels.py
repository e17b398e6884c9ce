"""Pseudo-labels, CAMs and random walks of many photographs as files, for training something else on."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..conventions import IGNORE, require, resize
from ..data.beside import Beside, Known
from ..data.files import read_photo, write_grey, write_label
from ..data.score_files import write_cams, write_scores
from ..data.settings import DataSettings
from ..data.transforms import normalize
from ..errors import AfaError, ConfigError, SavingError, reason
from ..labels.evidence import Evidence, MapSettings, evidence, evidence_of_several
from ..labels.kinds import CAM_KINDS
from ..labels.photograph_labels import photograph_label, photograph_walk
from ..labels.settings import LabelSettings
from ..runtime.phases import PhaseTimer, phase
from ..runtime.processes import announced_rank, laid_out, share_of
from ..runtime.progress import several, told
from ..runtime.writing import whole, writable_folder
from .asked import Asked, asked_photos
from .evaluate import EvaluateSettings
from .manifest import Manifest, same_photo

ENDINGS = {"cams": ".npz", "walks": ".npz", "labels": ".png", "confidence": ".png"}  # of what may be written
OF_EVALUATION = ("protocol", "long_side", "affinity_of", "amp", "channels_last", "batch")  # settings of both
WALKS = ("random_walk", "refined_random_walk")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class PseudoLabelSettings:
    """What is written, and how it is made.

    Args:
        save: what to write, some of cams, walks, labels and confidence. None: all that the model gives but the last.
        kind: which label map is the label: cam, refined_cam, random_walk or refined_random_walk. None takes the last,
            refined_cam for a model without attention.
        unknown: pixels on which the two background scores of training (low_score, high_score) disagree are 255; false:
            the one background score of evaluation (bkg_score, walk_score), no pixel 255.
        labels: a file of image-level labels, which must have every photograph; classifier: the classes that the
            classifier finds. None takes the data set's label file or XML annotations (its masks only with
            data.label_source masks), and the classifier's for photographs that have none.
        threshold: the classifier finds the classes it gives more than this, or at least the likeliest.
        protocol: training (the photograph at its own size) or test (its longer side 512). None: test.
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; 0: as they are.
            None, here and below: as the protocol has it.
        affinity_of: which pass gives the affinity of the random walk: largest (of the CAM's scales) or plain.
        amp: bf16 runs the networks in bfloat16, auto does on a GPU that computes in it; off is as published.
        channels_last: keep images and convolution weights in channels_last memory format.
        batch: photographs taken together. Those of them that go through the networks in the same size do so at once,
            which a GPU does faster; labels are those of 1 but for roundings.
        shard: I/N: label only the I-th of N shares of the photographs, I in 1..N; under torchrun each process takes
            its own.
        progress: show a progress bar on a terminal.
    """

    save: tuple[str, ...] | None = None
    kind: Literal["cam", "refined_cam", "random_walk", "refined_random_walk"] | None = None
    unknown: bool = True
    labels: str | None = None
    threshold: float = 0.5
    protocol: Literal["training", "test"] | None = None
    long_side: int | None = None
    affinity_of: Literal["largest", "plain"] | None = None
    amp: Literal["auto", "bf16", "off"] = "off"
    channels_last: bool = False
    batch: int = 1
    shard: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.save is not None:
            right = bool(self.save) and set(self.save) <= set(ENDINGS)
            require(right, "save", f"some of {', '.join(ENDINGS)}", " ".join(self.save))
        require(self.kind is None or self.kind in (*CAM_KINDS, *WALKS), "kind", "a kind of label map", self.kind)
        require(0 <= self.threshold <= 1, "threshold", "a probability in 0..1", self.threshold)
        self.evaluation()
        self.share()

    def evaluation(self) -> EvaluateSettings:
        """What makes `afa evaluate` see photographs in these sizes."""
        return EvaluateSettings(**{name: getattr(self, name) for name in OF_EVALUATION}).by("test")

    def share(self) -> tuple[int, int]:
        """Which share of the photographs, from 0, of how many."""
        return share_of(self.shard)


@dataclass
class Written:
    """What became of the photographs of one share.

    Attributes:
        saved: what was asked for.
        done: labelled now.
        skipped: those that were finished before.
        problems: why the others are not, a line for each.
        sources: of those labelled now, how many have their classes from where.
        seconds: that it took.
        phases: seconds of each part of the work.
    """

    saved: tuple[str, ...]
    done: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)


def write_pseudo_labels(
    model: nn.Module,
    images: Sequence[str],
    out: str | Path,
    class_names: Sequence[str],
    checkpoint: dict[str, Any],
    settings: PseudoLabelSettings | None = None,
    how: LabelSettings | None = None,
    data: DataSettings | None = None,
) -> Written:
    """Write ``cams/NAME.npz``, ``walks/NAME.npz``, ``labels/NAME.png`` and ``confidence/NAME.png`` of each photograph.

    docs/second_stage.md says what is in them. Finished photographs are left alone; each file appears when it is whole.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA` on any device.
        images: as :func:`~afa_model.evaluation.asked.asked_photos` takes them.
        out: folder to write into; made if need be.
        class_names: K names, background first.
        checkpoint: what the manifest says of it, with its ``sha256``.
        settings: what is written.
        how: training makes labels from the CAM.
        data: the data set's folders, label file and settings of photographs.

    Raises:
        ConfigError: ``out`` cannot be written into or was made otherwise, or the model gives no such label.
        DataError: no photographs, photographs that would share a name, or a label file that cannot be read.
        SavingError: the disk is full.
    """
    settings, data = settings or PseudoLabelSettings(), data or DataSettings()
    out = Path(out).expanduser()
    work = _Work(model, out, tuple(class_names), settings, how or LabelSettings(), data)
    asked = asked_photos(images, data, out)
    given = None if settings.labels == "classifier" else settings.labels
    beside = Beside(work.class_names, data, label_file=given)
    writable_folder(out, "out")
    share = settings.share()
    about = {"checkpoint": checkpoint, "class_names": work.class_names, "settings": work.record()}
    manifest = Manifest(out, about, share)
    names = sorted({**asked.photos, **asked.problems})[share[0] :: share[1]]
    result, start = Written(work.save), time.monotonic()
    timer = PhaseTimer(work.device)
    show = settings.progress and announced_rank() == 0
    try:
        with timer, laid_out(model, work.sizes.channels_last):
            for some in several(told(names, "labelling", lambda: result.done, show), settings.batch):
                _label(some, asked, work, beside, manifest, result)
                result.phases.update(timer.seconds())
    finally:
        manifest.write()
    result.seconds = time.monotonic() - start
    return result


class _Opened(NamedTuple):
    """A photograph that is to be labelled.

    name    in the folder
    path    of the file
    image   float32 [1, 3, H, W], normalised, on the model's device
    known   its classes
    about   what the manifest says of the file
    before  what the manifest had of this very photograph, or None
    """

    name: str
    path: Path
    image: Tensor
    known: Known
    about: dict[str, Any]
    before: dict[str, Any] | None


def _label(
    names: Sequence[str], asked: Asked, work: _Work, beside: Beside, manifest: Manifest, result: Written
) -> None:
    """Photographs that are taken together, whatever becomes of each."""
    opened = []
    for name in names:
        if name not in asked.photos:
            result.problems.append(asked.problems[name])
            continue
        with _problems_told(asked.photos[name], work, result):
            one = _open(name, asked.photos[name], work, beside, manifest, result)
            opened += [] if one is None else [one]
    for one, seen in zip(opened, work.look(opened)):
        with _problems_told(one.path, work, result):
            entry = {**one.about, **work.label(one, seen), "files": list(work.save)}
            if one.before is not None and one.before["classes"] == entry["classes"]:
                entry["files"] = [kind for kind in ENDINGS if kind in (*one.before["files"], *entry["files"])]
            manifest.add(one.name, entry)
            result.done += 1
            result.sources[entry["classes_from"]] += 1


def _open(
    name: str, path: Path, work: _Work, beside: Beside, manifest: Manifest, result: Written
) -> _Opened | None:
    """A photograph, unless it is finished or its name is another's."""
    known = Known() if work.settings.labels == "classifier" else beside.classes_of(path, name)
    before = manifest.images.get(name)
    same, about = same_photo(path, before)
    if before is not None and not same and _is_another(path, before["photo"]):
        result.problems.append(f"{path}: in {work.out} the name {name} is that of {before['photo']}; choose another"
                               " folder for out, or name the folder above both")  # fmt: skip
        return None
    if same and work.finished(name, before, known.labels):
        result.skipped += 1
        return None
    return _Opened(name, path, work.read(path), known, about, before if same else None)


@contextmanager
def _problems_told(path: Path, work: _Work, result: Written) -> Iterator[None]:
    """What goes wrong with a photograph keeps no other from being labelled.

    Raises:
        SavingError: the disk is full.
    """
    try:
        yield
    except AfaError as error:
        result.problems.append(str(error))
    except torch.OutOfMemoryError:
        result.problems.append(f"{path}: too large for the memory of {work.device} (--long_side makes it smaller)")
    except OSError as error:
        if error.errno in _NO_ROOM:
            finished = f"{result.done + result.skipped} photographs are finished and stay so"
            raise SavingError(f"out: {work.out} cannot be written ({reason(error)}); {finished}") from error
        result.problems.append(f"{path}: {reason(error)}")


def _is_another(path: Path, before: str) -> bool:
    """Whether the file that had a name before is still there and is none that ``path`` leads to."""
    return os.path.exists(before) and not os.path.samefile(path, before)


class _Work:
    """How one photograph is labelled and where its files go."""

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        class_names: tuple[str, ...],
        settings: PseudoLabelSettings,
        how: LabelSettings,
        data: DataSettings,
    ):
        if len(class_names) != model.num_classes:
            raise ValueError(f"class_names: expected the model's {model.num_classes} names, got {len(class_names)}")
        self.kind = settings.kind or ("refined_random_walk" if model.has_affinity else "refined_cam")
        usual = ("cams", "walks", "labels") if model.has_affinity else ("cams", "labels")
        self.save = tuple(kind for kind in ENDINGS if kind in (settings.save or usual))
        for name, value, walks in (("kind", self.kind, self.kind in WALKS), ("save", "walks", "walks" in self.save)):
            if walks and not model.has_affinity:
                raise ConfigError(f"{name}: {value} needs attention; the backbone {model.backbone} has none")
        evaluation = settings.evaluation()
        self.sizes: MapSettings = evaluation.maps()
        self.how = evaluation.labels(how)
        self.model, self.out, self.class_names, self.settings, self.data = model, out, class_names, settings, data
        self.device = next(model.parameters()).device

    def record(self) -> dict[str, Any]:
        """What decides how the files look."""
        own = {name: getattr(self.settings, name) for name in ("unknown", "threshold")}
        sizes = {name: getattr(self.sizes, name) for name in ("long_side", "affinity_of", "amp")}
        return {"kind": self.kind, **own, **sizes, "exif": self.data.exif, **asdict(self.how)}

    def path(self, what: str, name: str) -> Path:
        return self.out / what / f"{name}{ENDINGS[what]}"

    def finished(self, name: str, entry: dict[str, Any], labels: Tensor | None) -> bool:
        """Whether the files asked for are there, of these classes."""
        if not set(self.save) <= set(entry["files"]):
            return False
        of_classifier = entry["classes_from"] == "classifier"
        same = of_classifier if labels is None else not of_classifier and entry["classes"] == self._shown(labels)
        return same and all(self.path(what, name).is_file() for what in self.save)

    def read(self, path: Path) -> Tensor:
        """A photograph, float32 [1, 3, H, W], normalised, on the model's device."""
        with phase("reading"):
            return normalize(read_photo(path, self.data.exif, self.data.max_pixels))[None].to(self.device)

    def look(self, opened: Sequence[_Opened]) -> Sequence[Evidence | None]:
        """What the model says of each of several photographs; None of all where it is to be asked for one by one."""
        if len(opened) > 1:
            images, given = [one.image for one in opened], [one.known.labels for one in opened]
            with phase("CAM"), suppress(torch.OutOfMemoryError):  # of one of them, which will be told when it is alone
                return evidence_of_several(self.model, images, self.sizes, self.how, given, self.settings.threshold)
        return [None] * len(opened)

    def label(self, one: _Opened, seen: Evidence | None) -> dict[str, Any]:
        """Write the files of a photograph of which the model said that, or is to be asked -> what the manifest says."""
        save, how, name, image = self.save, self.how, one.name, one.image
        size = tuple(image.shape[2:])
        if seen is None:
            with phase("CAM"):
                seen = evidence(self.model, image, self.sizes, how, one.known.labels, self.settings.threshold)
        walk = photograph_walk(size, seen, how) if "walks" in save else None
        label = confidence = None
        if "labels" in save or "confidence" in save:
            made = photograph_label(self.kind, image, seen, how, self.settings.unknown, "confidence" in save)
            label, confidence = made.label.cpu(), made.confidence
        classes = seen.slots.classes[0, seen.slots.present[0]].tolist()
        with phase("writing"):
            if "cams" in save:
                with whole(self.path("cams", name)) as file:
                    write_cams(file, classes, _at_size(seen.cam[0, seen.slots.present[0]], size))
            if "walks" in save:
                with whole(self.path("walks", name)) as file:
                    write_scores(file, (0, *(index + 1 for index in classes)), walk)
            if "confidence" in save:
                with whole(self.path("confidence", name)) as file:
                    write_grey(file, confidence)
            if "labels" in save:
                with whole(self.path("labels", name)) as file:
                    write_label(file, label)
        return {
            "size": list(size),
            "classes": self._shown(seen.cls_labels),
            "classes_from": one.known.source or "classifier",
            "shares": {} if label is None else self._shares(label),
        }

    def _shown(self, labels: Tensor) -> list[str]:
        return [self.class_names[index] for index in (labels.nonzero().flatten() + 1).tolist()]

    def _shares(self, label: Tensor) -> dict[str, float]:
        """Which share of its pixels each class has, and what is left open."""
        counts = torch.bincount(label.flatten(), minlength=IGNORE + 1)
        names = {**dict(enumerate(self.class_names)), IGNORE: "unknown"}
        return {names[i]: round(int(counts[i]) / label.numel(), 5) for i in counts.nonzero().flatten().tolist()}


def _at_size(cam: Tensor, size: Sequence[int]) -> Tensor:
    """[n, h, w] -> float16 [n, H, W], one after the other: no more than one is held in float32."""
    resized = cam.new_empty(len(cam), *size, dtype=torch.float16)
    for out, one in zip(resized, cam):
        out.copy_(resize(one[None, None], size)[0, 0])
    return resized
