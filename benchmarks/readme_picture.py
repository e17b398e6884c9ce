"""The picture at the top of the README: two photographs, their CAMs, and the labels after PAMR, PAR and the dense CRF.

The CAMs are an ImageNet network's (imagenet_cams.py), the photographs two that lie in scikit-image's package, both CC0:
Chelsea the cat by Stefan van der Walt, and a cup of coffee by Rachel Michetti (Pikolo Espresso Bar).

pip install afa[real]; pip install --no-deps scikit-image
python benchmarks/readme_picture.py docs/images/real_cams.jpg
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import as_the_command  # noqa: F401
import numpy as np
import torch
from imagenet_cams import imagenet_cam, imagenet_network
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from quality_refinement import by_name, par
from refined_labels import Photo, Refine, refined_labels
from torch import Tensor, nn

from afa_model.errors import DataError
from afa_model.pictures.overlays import heat_overlay, label_overlay, photo_of
from afa_model.runtime.progress import progress
from afa_model.runtime.writing import whole, writable_file

BACKGROUND = 0.2  # what is best for PAR and the CRF on photographs of VOC, by docs/real_cams.md
COLOR = 6  # of VOC's palette: teal, which neither photograph has

COLUMNS: tuple[tuple[str, Refine], ...] = (
    ("CAM", by_name("none")),
    ("after PAMR", by_name("pamr")),
    ("after PAR", par()),
    ("after dense CRF", by_name("crf")),
)


class Example(NamedTuple):
    """A photograph in scikit-image's folder of data, and the ImageNet classes that its object is."""

    file: str
    classes: Sequence[int]


EXAMPLES = (
    Example("coffee.png", (504, 967, 968)),  # coffee mug, espresso, cup
    Example("chelsea.png", (281, 282, 283, 284, 285)),  # cats
)


def samples_folder() -> Path:
    """Where scikit-image keeps its pictures; the package, which needs many others, is not imported.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None:
        raise DataError("photographs: not found; `pip install --no-deps scikit-image` brings them, or name a folder")
    return Path(found.submodule_search_locations[0]) / "data"


def opened(path: Path) -> Tensor:
    """float32 [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def labels_of(network: nn.Module, image: Tensor, classes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The CAM [H, W] of one object in 0..1, and its label [H, W] of 0 and COLOR under each of COLUMNS."""
    cam = imagenet_cam(network, image, [classes])
    photo = Photo(image, torch.zeros(image.shape[2:]), torch.tensor([COLOR]), cam)
    scores = photo.scores(BACKGROUND)
    return cam[0, 0], [refined_labels(image, scores, photo.classes, refine)[0] for _, refine in COLUMNS]


def draw(axes: Axes, picture: np.ndarray, title: str = "", label: Tensor | None = None) -> None:
    """A picture, with a line around the object of a label."""
    axes.imshow(picture, interpolation="antialiased", aspect="auto")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=20, pad=6)
    if label is not None:
        line = axes.contour(label.numpy() > 0, [0.5], colors="white", linewidths=1.4)
        line.set_path_effects([withStroke(linewidth=2.6, foreground="black", alpha=0.5)])


def picture(network: nn.Module, folder: Path, examples: Sequence[Example] = EXAMPLES) -> Figure:
    """A row for each example."""
    figure = Figure(figsize=(16.6, 2.24 * len(examples) + 0.42))
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(examples), 1 + len(COLUMNS), squeeze=False)
    for first, row, example in zip((True, *[False] * len(examples)), grid, progress(examples, "photographs")):
        image = opened(folder / example.file)
        photo = photo_of(image[0])
        cam, labels = labels_of(network, image, example.classes)
        titles = [name if first else "" for name in ("photograph", *(name for name, _ in COLUMNS))]
        draw(row[0], photo, titles[0])
        draw(row[1], heat_overlay(photo, cam), titles[1], labels[0])
        for axes, title, label in zip(row[2:], titles[2:], labels[1:]):
            draw(axes, label_overlay(photo, label), title, label)
    top = 1 - 0.44 / figure.get_figheight()
    figure.subplots_adjust(left=0, right=1, bottom=0, top=top, wspace=0.02, hspace=0.03)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a file to write, .jpg or .png")
    parser.add_argument("--photographs", type=Path, help="folder of coffee.png, chelsea.png; default: scikit-image's")
    options = parser.parse_args(arguments)
    out = writable_file(options.out, "out")
    figure = picture(imagenet_network(), options.photographs or samples_folder())
    with whole(out) as path:
        figure.savefig(path, dpi=100, pil_kwargs={"quality": 85} if out.suffix in (".jpg", ".jpeg") else None)


if __name__ == "__main__":
    main()
