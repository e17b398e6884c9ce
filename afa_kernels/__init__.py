"""AFA's operators for PyTorch: pixel-adaptive refinement, window affinity from attention, random-walk propagation.

Every operator takes ``backend=None`` (the best that can run), ``"native"``, ``"triton"`` or ``"reference"``;
`backends` tells what can run here and why something cannot, `use_backend` and ``AFA_BACKEND`` set a default. On a GPU
a backend proves itself before it is used; `self_check` has all of them do so.

On the CPU the kernels run on torch's OpenMP threads, with one parallel region for each pass over the data. Beside other
busy processes set ``OMP_WAIT_POLICY=PASSIVE`` before Python starts, or each region waits for theirs; the `afa` command
does so itself.

The kernels have a backward. What else PyTorch may ask, tangents and the gradients of torch.func, the reference gives,
without being asked for; a second backward is that of PAR's images, of masks and of class activation maps alone.
"""

from .core.backends import backends, self_check, use_backend
from .core.native_module import build_info
from .core.self_check import CheckRow, CheckTable
from .ops.affinity import (
    affinity_from_maps,
    affinity_loss,
    attention_affinity_loss,
    dense_to_window,
    window_affinity,
    window_to_dense,
)
from .ops.bilateral import (
    DenseCRF,
    DenseEnergyLoss,
    bilateral_filter,
    crf_inference,
    crf_inference_label,
    dense_crf,
)
from .ops.diffusion import diffuse
from .ops.feature_affinity import feature_affinity
from .ops.par import PAMR, PAR, pamr, pamr_weights, par, par_weights
from .ops.path_affinity import path_affinity, propagate_to_edge
from .ops.pcm import pcm
from .ops.random_walk import random_walk, random_walk_with_background
from .ops.sinkhorn import sinkhorn

__version__ = "0.1.0"

__all__ = [
    "PAMR",
    "PAR",
    "CheckRow",
    "CheckTable",
    "DenseCRF",
    "DenseEnergyLoss",
    "affinity_from_maps",
    "affinity_loss",
    "attention_affinity_loss",
    "backends",
    "bilateral_filter",
    "build_info",
    "crf_inference",
    "crf_inference_label",
    "dense_crf",
    "dense_to_window",
    "diffuse",
    "feature_affinity",
    "pamr",
    "pamr_weights",
    "par",
    "par_weights",
    "path_affinity",
    "pcm",
    "propagate_to_edge",
    "random_walk",
    "random_walk_with_background",
    "self_check",
    "sinkhorn",
    "use_backend",
    "window_affinity",
    "window_to_dense",
]
