"""The bilateral filter, and what stands on it: the dense energy loss and the dense CRF."""

from .functional import bilateral_filter
from .mean_field import LatticeKernel, dense_crf
from .modules import UNLABELLED, DenseCRF, DenseEnergyLoss

__all__ = ["UNLABELLED", "DenseCRF", "DenseEnergyLoss", "LatticeKernel", "bilateral_filter", "dense_crf"]
