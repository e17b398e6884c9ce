"""The four wrappers around pydensecrf that repositories copy, under the names they have there.

    from afa_kernels.compat.crf import DenseCRF, crf_inference, crf_inference_label, dense_crf

``dense_crf(probs, img, n_classes, n_iters, scale_factor)`` is that of the copies; `afa_kernels.dense_crf` is the
operator. All take one image or a batch, numpy arrays or tensors; see `afa_kernels.crf_inference`.
"""

from ..ops.bilateral import DenseCRF, crf_inference, crf_inference_label
from ..ops.bilateral import dense_crf_of_probs as dense_crf

__all__ = ["DenseCRF", "crf_inference", "crf_inference_label", "dense_crf"]
