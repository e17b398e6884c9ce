"""Nothing imports this: pickles of whole `PAR` and `PAMR` modules written before afa_kernels.ops existed name it."""

from torch.nn import Module as _Kernel  # noqa: F401  what held PAMR's buffers

from .ops.par import PAMR, PAR  # noqa: F401
