"""The bilateral filter, and what stands on it: the dense energy loss and the dense CRF."""

from .functional import bilateral_filter
from .mean_field import LatticeKernel, crf_of_energies, dense_crf
from .modules import UNLABELLED, DenseEnergyLoss
from .wrappers import DenseCRF, crf_inference, crf_inference_label, dense_crf_of_probs

__all__ = [
    "UNLABELLED",
    "DenseCRF",
    "DenseEnergyLoss",
    "LatticeKernel",
    "bilateral_filter",
    "crf_inference",
    "crf_inference_label",
    "crf_of_energies",
    "dense_crf",
    "dense_crf_of_probs",
]
