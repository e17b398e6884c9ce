"""PAR's weight factors among the settings of labels."""

from __future__ import annotations

import pytest
import torch

from afa_kernels import par
from afa_model.labels.refinement import refine
from afa_model.labels.settings import LabelSettings


def test_par_takes_its_weight_factors_from_the_settings(rng):
    images, maps = torch.rand(1, 3, 20, 24, generator=rng), torch.rand(1, 2, 20, 24, generator=rng)
    shown = torch.ones(1, 2, dtype=torch.bool)

    def refined(*weights):
        how = LabelSettings(dilations=(1, 2), num_iter=3, **({"par_weights": weights} if weights else {}))
        return refine(images, maps, shown, how)

    assert torch.equal(refined(0.7, 0.4, 0.2), par(images, maps, (1, 2), 3, w1=0.7, w2=0.4, w3=0.2))
    assert torch.equal(refined(), par(images, maps, (1, 2), 3))


@pytest.mark.parametrize("wrong", [(0.0, 0.3, 0.01), (0.3, -1.0, 0.01), (0.3, 0.3, -0.01), (float("inf"), 0.3, 0.01)])
def test_factors_that_make_no_sense_are_named(wrong):
    with pytest.raises(ValueError, match=r"^par_weights: expected w1 and w2 above 0"):
        LabelSettings(par_weights=wrong)
