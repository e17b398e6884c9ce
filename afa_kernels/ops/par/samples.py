"""The small calls with which a backend of PAR and PAMR proves itself (`core.self_check`)."""

from __future__ import annotations

from ...core import backends
from ...core.self_check import Draw, Sample, odd_image
from .functional import par, par_weights
from .pamr_functional import pamr, pamr_weights

# More taps than the CUDA kernel keeps on chip, some of them farther than the image is wide: they are streamed.
_MANY = (1, 2, 3, 4, 6, 8, 12, 16, 24)


# Gradients are compared where the images are noise: at a pixel that stands out of a flat region that of the images is
# 1 / 1e-8^2 times a difference of roundings.
def _par_samples(draw: Draw) -> list[Sample]:
    odd = {"images": odd_image(draw, 8, 19), "masks": draw(2, 5, 8, 19)}
    plain = {"images": draw(1, 3, 8, 19), "masks": draw(1, 5, 8, 19)}
    many = {"dilations": _MANY, "num_iter": 2, "class_mask": draw(1, 5) > 0.3}
    return [
        Sample(par, odd, {"num_iter": 2}),
        Sample(pamr, plain, many, ("masks",)),
        Sample(par, plain, {"dilations": (1, 3), "num_iter": 2}, ("images", "masks")),
    ]


def _par_weights_samples(draw: Draw) -> list[Sample]:
    odd, plain = {"images": odd_image(draw, 8, 19)}, {"images": draw(2, 3, 8, 19)}
    return [
        Sample(par_weights, odd),
        Sample(pamr_weights, odd, {"dilations": (1, 3)}),
        Sample(par_weights, plain, {"dilations": (1, 3)}, ("images",)),
        Sample(par_weights, {"images": draw(1, 3, 40, 33)}),  # whose shared memory must be asked for
    ]


backends.register("par", _par_samples)
backends.register("par_weights", _par_weights_samples)
