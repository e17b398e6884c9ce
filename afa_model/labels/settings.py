"""How labels are made of a CAM: one object for training, evaluation and prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from afa_kernels.ops.par import DILATIONS

from ..conventions import require, under
from .crf import CrfSettings
from .refinement import check_refinement


@dataclass
class LabelSettings:
    """How pixel labels are made from image-level ones; the defaults are the published ones for VOC.

    Args:
        cam_scales: of the CAM, each with a flipped copy; they are summed.
        radius: of the affinity's window, in cells of the model's grid.
        walk_power: exponent of the affinity in the random walk.
        walk_eps: added to the sums that normalise the random walk.
        refinement: what mends the borders of labels, by its name in refinement.py: par, pamr, crf or none.
        dilations: distances of the neighbours of par and pamr in pixels.
        num_iter: their iterations.
        par_weights: w1, w2 and w3 of par: how sharply it tells colours apart, and distances, and how much the distances
            count beside the colours.
        dense_crf: what crf is like, here and after the segmentation.
        high_score: CAM value in 0..1 below which a pixel is background; training leaves open what lies between it and
            low_score.
        low_score: CAM value below which a pixel is certainly background.
        bkg_score: the one background score of evaluation and prediction, where nothing is left open.
        walk_score: that of the random-walk label; None: what eval.protocol has, else bkg_score.
    """

    cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    radius: int = 8
    walk_power: float = 2.0
    walk_eps: float = 0.1
    refinement: str = "par"
    dilations: tuple[int, ...] = DILATIONS
    num_iter: int = 10
    par_weights: tuple[float, float, float] = (0.3, 0.3, 0.01)
    dense_crf: CrfSettings = field(default_factory=CrfSettings)
    high_score: float = 0.55
    low_score: float = 0.35
    bkg_score: float = 0.45
    walk_score: float | None = None

    def __post_init__(self) -> None:
        check_refinement(self.refinement)
        with under("dense_crf"):
            self.dense_crf.__post_init__()  # again: values may have been changed since
        sizes = bool(self.cam_scales) and all(0 < scale < math.inf for scale in self.cam_scales)
        require(sizes, "cam_scales", "positive numbers", self.cam_scales)
        require(bool(self.dilations) and min(self.dilations) >= 1, "dilations", "pixels of at least 1", self.dilations)
        w1, w2, w3 = self.par_weights
        weights = 0 < w1 < math.inf and 0 < w2 < math.inf and 0 <= w3 < math.inf
        require(weights, "par_weights", "w1 and w2 above 0 and w3 of at least 0", self.par_weights)
        for name in ("radius", "num_iter", "walk_eps"):
            require(0 <= getattr(self, name) < math.inf, name, "at least 0", getattr(self, name))
        require(0 < self.walk_power < math.inf, "walk_power", "a positive number", self.walk_power)
        for name in ("bkg_score", "walk_score", "high_score", "low_score"):
            # a CAM is in 0..1: with a score above nothing would ever be found
            score = getattr(self, name)
            require(score is None or 0 <= score <= 1, name, "a score in 0..1", score)
        if not self.low_score <= self.high_score:
            raise ValueError(
                f"low_score, high_score: expected low_score <= high_score, got {self.low_score} and {self.high_score}"
            )

    @property
    def scores(self) -> tuple[float, ...]:
        """Background scores of training, low first; one if they are the same."""
        return (self.low_score,) if self.low_score == self.high_score else (self.low_score, self.high_score)

    @property
    def one_score(self) -> tuple[float, ...]:
        """The background score of evaluation."""
        return (self.bkg_score,)

    @property
    def one_walk_score(self) -> tuple[float, ...]:
        """That of the random-walk label."""
        return self.one_score if self.walk_score is None else (self.walk_score,)
