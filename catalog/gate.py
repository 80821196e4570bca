"""The gate of a promotion: limits for a candidate's scores, compared with the champion's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class VersionScores:
    """Scores of a version on the pinned evaluation set.

    Attributes
    ----------
    mse_paper
        Eq. (1) of the paper; NaN for classifiers, which predict no cell.
    accuracy
        Share of profiles with the right phase.
    calibration_error
        Expected calibration error of the probability of the predicted phase.
    seconds
        Median time of a prediction for one profile.
    by_system
        ``mse_paper`` by the name of the crystal system.
    """

    mse_paper: float
    accuracy: float
    calibration_error: float
    seconds: float
    by_system: Mapping[str, float]


@dataclass(frozen=True)
class Gate:
    """Limits that a candidate must not exceed.

    Attributes
    ----------
    error_ratio
        Its ``mse_paper`` over the champion's.
    accuracy_drop
        How much lower its accuracy may be.
    calibration_rise
        How much higher its calibration error may be.
    seconds
        Time of a prediction; a slower candidate passes if the champion is slower still.
    """

    error_ratio: float = 1.0
    accuracy_drop: float = 0.0
    calibration_rise: float = 0.01
    seconds: float = 0.05

    def objections(self, candidate: VersionScores, champion: VersionScores | None) -> list[str]:
        """Return why a candidate must not replace a champion; none if it may."""
        objections = []
        if candidate.seconds > max(self.seconds, champion.seconds if champion else 0.0):
            objections.append(
                f"it takes {1e3 * candidate.seconds:.1f} ms for a prediction, and "
                f"{1e3 * self.seconds:.1f} ms are allowed"
            )
        if champion is None:
            return objections
        # A comparison with NaN is false: models without a cell are compared by the rest.
        if candidate.mse_paper > self.error_ratio * champion.mse_paper:
            objections.append(
                f"its mse_paper is {candidate.mse_paper:.3g}, the champion's "
                f"{champion.mse_paper:.3g} (ratio allowed: {self.error_ratio:g})"
            )
        if candidate.accuracy < champion.accuracy - self.accuracy_drop:
            objections.append(
                f"its accuracy is {candidate.accuracy:.4%}, the champion's {champion.accuracy:.4%}"
            )
        if candidate.calibration_error > champion.calibration_error + self.calibration_rise:
            objections.append(
                f"its calibration error is {candidate.calibration_error:.4f}, the champion's "
                f"{champion.calibration_error:.4f} (rise allowed: {self.calibration_rise:g})"
            )
        return objections
