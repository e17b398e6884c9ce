"""AFA's operators for PyTorch: pixel-adaptive refinement, window affinity from attention, random-walk propagation.

Every operator takes ``backend=None`` (the best that can run), ``"native"``, ``"triton"`` or ``"reference"``;
`backends` tells what can run here and why something cannot, `use_backend` and ``AFA_BACKEND`` set a default.
"""

from ._backends import backends, use_backend
from ._native_module import build_info
from .diffusion import diffuse
from .par import pamr, pamr_weights, par, par_weights
from .par_modules import PAMR, PAR

__version__ = "0.1.0"

__all__ = [
    "PAMR",
    "PAR",
    "backends",
    "build_info",
    "diffuse",
    "pamr",
    "pamr_weights",
    "par",
    "par_weights",
    "use_backend",
]
