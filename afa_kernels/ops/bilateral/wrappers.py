"""The functions around pydensecrf that repositories copy from each other, on the lattice: of one image or a batch, of
numpy arrays or tensors, with the settings that the copies have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ...core.checks import FLOATS, INTEGERS, check_float, check_int
from .functional import check_method, warn_unless_grey_levels
from .mean_field import check_kernels, crf_of_energies, dense_crf

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any] | Tensor"  # whoever has an array has numpy; tensors do without
Given = TypeVar("Given", "NDArray[Any]", Tensor)  # what comes back is of the kind of what was given


def crf_inference(
    img: Array, probs: Given, t: int = 10, scale_factor: float = 1, labels: int | None = None
) -> Given:
    """Refine class probabilities: a Gaussian of place (weight 3, 3 pixels) and a bilateral kernel (10; 80 pixels, 13
    grey levels), the pixels divided by ``scale_factor``.

    Args:
        img: [h, w, 3] or [3, h, w], or a batch [B, h, w, 3] or [B, 3, h, w]: a uint8 array, or a tensor of uint8 or
            floats in 0..255. Where the shape fits both, arrays have the colours last and tensors have them first.
        probs: [C, h, w] or [B, C, h, w] in 0..1; array or tensor. Those below 1e-5 count as 1e-5.
        t: iterations of mean field, at least 0.
        scale_factor: positive: by how much the photograph was made smaller; 2 halves both deviations of place.
        labels: C, if it is to be checked.

    Returns:
        Probabilities in the shape of probs; an array (float32) for an array, a tensor of its dtype, on its device and
        with its gradient for a tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Examples:
        >>> import torch
        >>> from afa_kernels import crf_inference
        >>> image, probs = torch.randint(256, (40, 50, 3), dtype=torch.uint8), torch.rand(21, 40, 50).softmax(0)
        >>> crf_inference(image, probs, t=5).shape
        torch.Size([21, 40, 50])
    """
    scale = check_float(scale_factor, "scale_factor", positive=True)
    return _refined(img, probs, t, labels, (3, 3 / scale, 10, 80 / scale, 13), ("img", "probs", "t", "labels"))


def dense_crf_of_probs(
    probs: Given, img: Array, n_classes: int | None = None, n_iters: int = 1, scale_factor: float = 1
) -> Given:
    """`crf_inference` as the copies named ``dense_crf`` have it: probabilities first, one iteration unless told.
    `afa_kernels.compat.crf` has it under that name.
    """
    scale = check_float(scale_factor, "scale_factor", positive=True)
    names = "img", "probs", "n_iters", "n_classes"
    return _refined(img, probs, n_iters, n_classes, (3, 3 / scale, 10, 80 / scale, 13), names)


def crf_inference_label(
    img: Array, labels: Given, t: int = 10, n_labels: int = 21, gt_prob: float = 0.7
) -> Given:
    """Refine labels: a Gaussian of place (weight 3, 3 pixels) and a bilateral kernel (10; 50 pixels, 5 grey levels).

    Args:
        img: as in `crf_inference`.
        labels: [h, w] or [B, h, w], integers in 0..n_labels - 1; array or tensor.
        t: iterations of mean field, at least 0.
        n_labels: classes, at least 2.
        gt_prob: how likely a label is right, between 0 and 1; the other classes share the rest.

    Returns:
        Labels, int64 in the shape of labels; an array for an array, a tensor on its device for a tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Examples:
        >>> import torch
        >>> from afa_kernels import crf_inference_label
        >>> image, labels = torch.randint(256, (40, 50, 3), dtype=torch.uint8), torch.randint(21, (40, 50))
        >>> crf_inference_label(image, labels, t=5).shape
        torch.Size([40, 50])
    """
    t, n_labels = check_int(t, "t", 0), check_int(n_labels, "n_labels", 2)
    gt_prob = check_float(gt_prob, "gt_prob", positive=True)
    if gt_prob >= 1:
        raise ValueError(f"gt_prob must be between 0 and 1, got {gt_prob}")
    classes = _tensor(labels, "labels", (torch.bool, *INTEGERS)).long()
    if classes.dim() not in (2, 3) or not classes.numel():
        raise ValueError(f"labels must be [h, w] or [B, h, w], got shape {tuple(classes.shape)}")
    pixels = _pixels(img, ("img", "labels"), classes.shape[:-2], classes.shape[-2:], classes.device)
    classes = classes.reshape(-1, *classes.shape[-2:])
    if int(classes.min()) < 0 or int(classes.max()) >= n_labels:
        found = f"{int(classes.min())}..{int(classes.max())}"
        raise ValueError(f"labels must be in 0..{n_labels - 1}, n_labels - 1, got {found}")
    wrong, right = -math.log((1 - gt_prob) / (n_labels - 1)), -math.log(gt_prob)
    energies = torch.full((len(classes), n_labels, *classes.shape[1:]), wrong, device=classes.device)
    energies.scatter_(1, classes[:, None], right)
    kernels = [(3.0, 3.0, 0.0), (10.0, 50.0, 5.0)]
    warn_unless_grey_levels(pixels, 5.0, "img")
    with torch.no_grad():
        refined = crf_of_energies(pixels.float(), energies, t, kernels, "symmetric").argmax(1)
    return _like(refined.view(labels.shape), labels)


class DenseCRF:
    """Drop-in for the wrapper class around pydensecrf that many repositories have.

    ``DenseCRF(iter_max, pos_w, pos_xy_std, bi_w, bi_xy_std, bi_rgb_std)(image, probmap)``; see `afa_kernels.dense_crf`.

    __call__(image [H, W, 3] uint8, probmap [C, H, W] in 0..1) -> [C, H, W] float32 probabilities; batches, tensors and
    other layouts as in `crf_inference`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Examples:
        >>> import numpy
        >>> from afa_kernels import DenseCRF
        >>> refine = DenseCRF(iter_max=10, pos_w=3, pos_xy_std=3, bi_w=4, bi_xy_std=64, bi_rgb_std=5)
        >>> image, probs = numpy.zeros((40, 50, 3), numpy.uint8), numpy.full((21, 40, 50), 1 / 21, numpy.float32)
        >>> refine(image, probs).shape
        (21, 40, 50)
    """

    def __init__(
        self,
        iter_max: int,
        pos_w: float,
        pos_xy_std: float,
        bi_w: float,
        bi_xy_std: float,
        bi_rgb_std: float,
        method: str = "lattice",
    ) -> None:
        check_kernels(pos_w, pos_xy_std, bi_w, bi_xy_std, bi_rgb_std)
        self.iter_max = check_int(iter_max, "iter_max", 0)
        self.pos_w, self.pos_xy_std = pos_w, pos_xy_std
        self.bi_w, self.bi_xy_std, self.bi_rgb_std = bi_w, bi_xy_std, bi_rgb_std
        self.method = check_method(method)

    def __call__(self, image: Array, probmap: Given) -> Given:
        kernels = self.pos_w, self.pos_xy_std, self.bi_w, self.bi_xy_std, self.bi_rgb_std
        names = "image", "probmap", "iter_max", "C"
        return _refined(image, probmap, self.iter_max, None, kernels, names, self.method)


def _refined(
    img: Array,
    probs: Given,
    num_iter: int,
    classes: int | None,
    kernels: tuple[float, ...],
    names: tuple[str, str, str, str],
    method: str = "lattice",
) -> Given:
    scores = _tensor(probs, names[1], (torch.bool, *INTEGERS, *FLOATS))
    if scores.dim() not in (3, 4) or not scores.numel():
        raise ValueError(f"{names[1]} must be [C, h, w] or [B, C, h, w], got shape {tuple(scores.shape)}")
    num_iter = check_int(num_iter, names[2], 0)
    if classes is not None and classes != scores.shape[-3]:
        raise ValueError(f"{names[3]} must be the {scores.shape[-3]} channels of {names[1]}, got {classes}")
    pixels = _pixels(img, names[:2], scores.shape[:-3], scores.shape[-2:], scores.device)
    if not isinstance(probs, Tensor) or not scores.is_floating_point():
        scores = scores.float()
    batch = scores.reshape(-1, *scores.shape[-3:])
    refined = dense_crf(pixels, batch, num_iter, *kernels, method=method).view(scores.shape)
    return _like(refined, probs)


def _numpy(name: str) -> Any:
    try:
        import numpy
    except ModuleNotFoundError as error:
        told = f"{name} is no tensor, and numpy, which would read it, is not installed: pip install numpy"
        raise ModuleNotFoundError(told, name="numpy") from error
    return numpy


def _tensor(value: Array, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value
    else:
        np = _numpy(name)
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} must hold numbers, got {array.dtype}")
        wide = array.dtype.kind == "u" and array.dtype.itemsize > 1
        tensor = torch.from_numpy(np.array(array, dtype=np.int64 if wide else None))
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be of {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def _pixels(
    img: Array, names: tuple[str, ...], batch: torch.Size, size: torch.Size, device: torch.device
) -> Tensor:
    """[B, 3, h, w], on the device."""
    name, other = names
    pixels = _tensor(img, name, (torch.uint8, *FLOATS) if isinstance(img, Tensor) else (torch.uint8,))
    last, first = (*batch, *size, 3), (*batch, 3, *size)
    orders = (first, last) if isinstance(img, Tensor) else (last, first)
    found = next((order for order in orders if tuple(pixels.shape) == order), None)
    if found is None:
        expected = " or ".join(str(list(order)) for order in (last, first))
        raise ValueError(f"{name} must have shape {expected}, as {other} has, got {list(pixels.shape)}")
    if found is last:
        pixels = pixels.movedim(-1, -3)
    if pixels.dtype == torch.float64:
        pixels = pixels.float()
    return pixels.reshape(-1, 3, *size).to(device)


def _like(result: Tensor, given: Given) -> Given:
    return cast("Given", result if isinstance(given, Tensor) else result.numpy())


# Pickles of whole objects keep the public path, whatever the files are called.
DenseCRF.__module__ = "afa_kernels"
