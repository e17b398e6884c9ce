"""The bilateral filter, and what stands on it: the dense energy loss and the dense CRF."""

from .functional import bilateral_filter
from .mean_field import LatticeKernel, crf_of_energies, dense_crf
from .modules import UNLABELLED, DenseCRF, DenseEnergyLoss

__all__ = [
    "UNLABELLED",
    "DenseCRF",
    "DenseEnergyLoss",
    "LatticeKernel",
    "bilateral_filter",
    "crf_of_energies",
    "dense_crf",
]
