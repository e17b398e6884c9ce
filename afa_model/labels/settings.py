"""How labels are made of a CAM: one object for training, evaluation and prediction."""

from __future__ import annotations

from dataclasses import dataclass

from afa_kernels.ops.par import DILATIONS

from .refinement import check_refinement


@dataclass
class LabelSettings:
    """How pixel labels are made from image-level ones; the defaults are the published ones for VOC.

    Args:
        cam_scales: of the CAM, each with a flipped copy; they are summed.
        radius: of the affinity's window, in cells of the model's grid.
        walk_power: exponent of the affinity in the random walk.
        walk_eps: added to the sums that normalise the random walk.
        refinement: what mends the borders of labels, by its name in refinement.py: par, pamr or none.
        dilations: distances of the refinement's neighbours in pixels.
        num_iter: its iterations.
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
    high_score: float = 0.55
    low_score: float = 0.35
    bkg_score: float = 0.45
    walk_score: float | None = None

    def __post_init__(self) -> None:
        check_refinement(self.refinement)
        if not self.cam_scales or min(self.cam_scales) <= 0:
            raise ValueError(f"cam_scales: expected positive numbers, got {self.cam_scales}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations: expected pixels of at least 1, got {self.dilations}")
        for name, least in (("radius", 0), ("num_iter", 0), ("walk_eps", 0), ("bkg_score", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.walk_score is not None and not self.walk_score >= 0:
            raise ValueError(f"walk_score: expected at least 0, got {self.walk_score}")
        if not self.walk_power > 0:
            raise ValueError(f"walk_power: expected a positive number, got {self.walk_power}")
        if not 0 <= self.low_score <= self.high_score:
            raise ValueError(
                "low_score, high_score: expected 0 <= low_score <= high_score,"
                f" got {self.low_score} and {self.high_score}"
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
