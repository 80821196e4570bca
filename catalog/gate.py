"""Gates of promotion: what a version must not be worse than, the champion or simple baselines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from bragg_data.model_provenance import ACCEPTED, ModelProvenance


@dataclass(frozen=True)
class VersionScores:
    """Scores of a version on the pinned evaluation set."""

    mse_paper: float  # eq. (1) of the paper; NaN for classifiers, which predict no cell
    accuracy: float  # share of profiles with the right phase
    calibration_error: float  # expected, of the probability of the predicted phase
    seconds: float  # median time of a prediction for one profile
    by_system: Mapping[str, float]  # mse_paper by crystal system


@dataclass(frozen=True)
class Gate:
    """Limits that a candidate must not exceed."""

    error_ratio: float = 1.0  # its mse_paper over the champion's
    accuracy_drop: float = 0.0  # how much lower its accuracy may be
    calibration_rise: float = 0.01  # how much higher its calibration error may be
    seconds: float = 0.05  # a slower candidate passes if the champion is slower still

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


@dataclass(frozen=True)
class BaselineComparison:
    """Errors of a model and of baselines on the same held-out samples; lower is better.

    Of a model that rejects profiles, on those that it accepts: a rejected result is not used.
    A model has to be better than all baselines to become the champion by itself: worse than a
    constant, its predictions and intervals say nothing about a profile.
    """

    metric: str  # mse_paper (equation (1) of the paper) or error_rate
    n_samples: int
    model: float
    baselines: Mapping[str, float]  # by name: constant, library match

    @classmethod
    def from_provenance(cls, provenance: ModelProvenance) -> Self | None:
        """Return the comparison that a model's training recorded; None if it recorded none."""
        score, test, baselines = provenance.score, provenance.test, provenance.baselines
        if score is None or test is None or not baselines:
            return None
        if ACCEPTED in test:  # the baselines are of these
            accepted = test[ACCEPTED]
            return cls(score.name, int(accepted["n"]), accepted[score.name], baselines)
        return cls(score.name, int(test["all"]["n"]), score.value, baselines)

    @property
    def not_beaten(self) -> tuple[str, ...]:
        """The baselines that the model is not better than; all of them if its error is NaN."""
        return tuple(name for name, error in self.baselines.items() if not self.model < error)

    def __str__(self) -> str:
        """Return the comparison in one sentence."""
        errors = ", ".join(f"{name} {error:.3g}" for name, error in self.baselines.items())
        samples = f"{self.n_samples:,} held-out samples"
        return f"{self.metric} on {samples}: model {self.model:.3g}, {errors}"
