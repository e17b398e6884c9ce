"""Models for other programs: ONNX, TorchScript and torch.export, each run beside PyTorch before its file is there."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..conventions import require
from ..errors import ConfigError, SavingError, reason
from ..networks.afa import AFA
from ..networks.segmenter import Gives, Segmenter, Takes
from ..runtime.writing import whole, writable_file

Format = Literal["onnx", "torchscript", "exported"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "exported", ".ts": "torchscript", ".torchscript": "torchscript"}
LEAST_SIDE = 64
"""Of images of any size: what keys and values are made of is then two patches wide at least, in every stage; a program
for such maps is another one than for maps of one patch.
"""
TOLERANCE = 1e-3
"""Largest difference from PyTorch, relative to the largest logit."""

_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
_ABOUT = "afa"  # under which name a file says what it holds


@dataclass
class ExportSettings:
    """What is exported, and how it is called.

    Args:
        format: onnx, torchscript or exported (torch.export); null: as the file's ending says (.onnx, .ts, .pt2).
        size: height and width of the photographs.
        dynamic: take photographs of any size from 64 x 64 on, and any number of them at once.
        takes: pixels (float32 RGB in 0..255, normalised inside), bytes (uint8, likewise), or normalised (float32, by
            ImageNet's mean and deviation).
        gives: labels (int64, the likeliest class of each pixel) or logits (float32, one map a class), both at the
            photograph's size, background first.
    """

    format: Format | None = None
    size: tuple[int, int] = (512, 512)
    dynamic: bool = False
    takes: Takes = "pixels"
    gives: Gives = "labels"

    def __post_init__(self) -> None:
        self.size = tuple(self.size)
        fits = len(self.size) == 2 and all(side >= LEAST_SIDE for side in self.size)
        require(fits, "size", f"height and width of at least {LEAST_SIDE}", self.size)


@dataclass(frozen=True)
class Compared:
    """An exported model beside PyTorch, on one batch.

    Attributes:
        shape: of the images [B, 3, H, W].
        difference: the largest of the logits, relative to the largest logit; of labels the share of pixels with
            another label.
        wrong: whether it is too much: more than TOLERANCE; of labels whether any has a logit that far below the best.
    """

    shape: tuple[int, ...]
    difference: float
    wrong: bool


def export_model(
    model: AFA, out: str | Path, class_names: Sequence[str], settings: ExportSettings | None = None
) -> tuple[Path, list[Compared]]:
    """Write a model for another program, and run what was written beside PyTorch: at the size it was made for, and if
    that is dynamic at others too.

    Raises:
        ConfigError: ``format`` cannot be told, packages are missing, or the file cannot be written.
        SavingError: what was exported differs from PyTorch; nothing is left at ``out``.
        ValueError: the model has no decoder.
    """
    settings = settings or ExportSettings()
    path = writable_file(out, "out")
    kind = settings.format or SUFFIXES.get(path.suffix)
    if kind is None:
        raise ConfigError(f"format: expected onnx, torchscript or exported: the ending of {path.name} tells none")
    if kind == "exported" and path.suffix != ".pt2":
        raise ConfigError(f"out: PyTorch reads exported programs from files that end in .pt2, got {path.name}")
    _require_packages(kind)
    if settings.dynamic and getattr(model.encoder, "relative", False):
        raise ConfigError(
            f"dynamic: the relative positions of {model.backbone} are made for one size at a time: leave dynamic out"
        )
    model = model.cpu().float().eval()
    network, plain = Segmenter(model, settings.takes, settings.gives), Segmenter(model, settings.takes, "logits")
    about = {
        "images": f"[B, 3, H, W], RGB, {settings.takes}",
        settings.gives: "[B, H, W]" if settings.gives == "labels" else "[B, K, H, W]",
        "size": "any" if settings.dynamic else list(settings.size),
        "class_names": list(class_names),
    }
    try:
        with torch.no_grad(), whole(path) as temporary:
            example = _images((1 + settings.dynamic, *settings.size), settings.takes, seed=0)
            with _quiet():
                _WRITERS[kind](network, example, temporary, settings, json.dumps(about))
                run = _READERS[kind](temporary)
            done = [_compared(plain, run, images, settings.gives) for images in _checked_on(example, settings)]
            wrong = next((item for item in done if item.wrong), None)
            if wrong is not None:
                raise SavingError(
                    f"{path} was not written: on images {list(wrong.shape)} the model as {kind} differs from PyTorch by"
                    f" {wrong.difference:.2g}"
                )
    except OSError as error:
        raise SavingError(f"could not write {path}: {reason(error)}") from error
    return path, done


def _require_packages(kind: Format) -> None:
    needed = _NEEDED.get(kind, ())
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError as error:
            install = f"pip install {' '.join(needed)}"
            raise ConfigError(
                f"format: {kind} needs {name}, which cannot be imported ({reason(error)}): {install}"
            ) from error


def _images(shape: Sequence[int], takes: Takes, seed: int) -> Tensor:
    """Random images [B, 3, H, W] with large and small structures."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 1 + height // 32, 1 + width // 32, generator=generator)
    fine = torch.rand(batch, 3, height, width, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").mul(0.7).add(0.3 * fine)
    if takes == "normalised":
        return (images - 0.5) / 0.25
    images = images * 255
    return images.byte() if takes == "bytes" else images


def _checked_on(example: Tensor, settings: ExportSettings) -> Iterator[Tensor]:
    yield example
    if settings.dynamic:  # odd sides, the wider the flatter
        height, width = (max(LEAST_SIDE, round(side * share)) for side, share in zip(settings.size, (0.61, 1.13)))
        yield _images((1, height | 1, width | 1), settings.takes, seed=1)
        yield _images((3, LEAST_SIDE, LEAST_SIDE + 1), settings.takes, seed=2)


def _compared(plain: Segmenter, run: Callable[[Tensor], Tensor], images: Tensor, gives: Gives) -> Compared:
    want = plain(images)
    try:
        got = run(images)
    except (AssertionError, RuntimeError) as error:  # how programs refuse a size that they turn out not to be for
        raise SavingError(
            f"the model was not written: exported it does not run on images {list(images.shape)} (without dynamic it"
            f" is for one size alone): {reason(error)}"
        ) from error
    largest = float(want.abs().max())
    if gives == "logits":
        fits = got.shape == want.shape
        difference = float((got - want).abs().max()) / largest if fits else float("inf")
        return Compared(tuple(images.shape), difference, not difference <= TOLERANCE)
    if got.shape != want[:, 0].shape or got.min() < 0 or got.max() >= want.shape[1]:
        return Compared(tuple(images.shape), 1.0, True)
    behind = want.amax(1) - want.gather(1, got[:, None])[:, 0]
    other = got != want.argmax(1)
    return Compared(tuple(images.shape), float(other.float().mean()), not bool((behind <= TOLERANCE * largest).all()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of what their result is checked for afterwards. oneDNN's layers are in no other program."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        logging.disable(before)


def _program(network: Segmenter, example: Tensor, settings: ExportSettings) -> torch.export.ExportedProgram:
    dynamic = None
    if settings.dynamic:
        # What the grids' sizes mean for each other holds from the least side on, but torch.export's solver does not
        # see it in the rounded divisions, and would refuse dimensions that are said to be free. Whether they are is
        # seen in running the result.
        side = torch.export.Dim.AUTO(min=LEAST_SIDE)
        dynamic = ({0: torch.export.Dim.AUTO(min=1), 2: side, 3: side},)
    return torch.export.export(network, (example,), dynamic_shapes=dynamic)


def _write_onnx(network: Segmenter, example: Tensor, path: Path, settings: ExportSettings, about: str) -> None:
    import onnx

    program = torch.onnx.export(
        _program(network, example, settings),
        dynamo=True,
        input_names=["images"],
        output_names=[settings.gives],
        external_data=False,
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {_ABOUT: about})
    onnx.save(model, path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torchscript(network: Segmenter, example: Tensor, path: Path, settings: ExportSettings, about: str) -> None:
    script = torch.jit.trace(network, example, check_trace=False)
    torch.jit.save(script, str(path), _extra_files={_ABOUT: about})


def _write_exported(network: Segmenter, example: Tensor, path: Path, settings: ExportSettings, about: str) -> None:
    torch.export.save(_program(network, example, settings), str(path), extra_files={_ABOUT: about})


_WRITERS: dict[str, Callable[..., Any]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "exported": _write_exported,
}
_READERS: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "onnx": _read_onnx,
    "torchscript": lambda path: torch.jit.load(str(path)),
    "exported": lambda path: torch.export.load(str(path)).module(),
}
