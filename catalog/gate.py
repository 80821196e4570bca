"""Gates of promotion: what a version must not be worse than, the champion or simple baselines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.model_provenance import ACCEPTED, ModelProvenance

_TIMING = 1.25  # times as long as the champion's is within what ten timings are worth
_DISASTER = 100.0  # times the limit: errors that rare profiles may not have either
_MEDIAN_RATIO = 1.2  # of medians of squared errors, over the ratio of means that is allowed


@dataclass(frozen=True)
class VersionScores:
    """Scores of a version on the pinned evaluation set."""

    # Eq. (1) of the paper; NaN for classifiers, which predict no cell, infinite if not all cells
    # are numbers.
    mse_paper: float
    accuracy: float  # share of profiles with the right crystal system
    calibration_error: float  # expected, of the probability of the predicted phase
    seconds: float  # median time of a processor for one profile, in one thread
    by_system: Mapping[str, float]  # mse_paper by crystal system


@dataclass(frozen=True, eq=False)
class PairedScores:
    """Scores of candidate (row 0) and champion (row 1) for each of the same n profiles."""

    squared: Array  # (2, n): what each adds to mse_paper; NaN for classifiers
    wrong: Mask  # (2, n): the crystal system is another one


@dataclass(frozen=True)
class Gate:
    """Limits that a candidate must not exceed by more than chance among the profiles explains.

    A limit is exceeded if it is in 95 % of bootstrap resamples of the profiles, the same ones for
    both versions (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). As a
    mean of heavy-tailed errors hides what happens to most profiles, medians are compared, too; and
    a hundred times the mean that is allowed is no chance, however few profiles cause it.
    """

    error_ratio: float = 1.0  # its mse_paper over the champion's
    accuracy_drop: float = 0.0  # how much lower its accuracy may be
    calibration_rise: float = 0.01  # how much higher its calibration error may be
    seconds: float = 0.05  # a slower candidate passes if the champion is as slow

    def objections(
        self,
        candidate: VersionScores,
        champion: VersionScores | None,
        paired: PairedScores | None = None,
    ) -> list[str]:
        """Return why a candidate must not replace a champion; none if it may.

        Without scores of single profiles nothing is left to chance.
        """
        objections = []
        if candidate.seconds > max(self.seconds, _TIMING * champion.seconds if champion else 0.0):
            objections.append(
                f"it takes {1e3 * candidate.seconds:.1f} ms for a prediction, and "
                f"{1e3 * self.seconds:.1f} ms are allowed"
            )
        if champion is None:
            return objections
        # A comparison with NaN is false: models without a cell are compared by the rest.
        surely = partial(_surely_above, None if paired is None else paired.squared)
        limit = self.error_ratio * champion.mse_paper
        if candidate.mse_paper > _DISASTER * limit or (
            candidate.mse_paper > limit and surely(np.mean, self.error_ratio)
        ):
            objections.append(
                f"its mse_paper is {candidate.mse_paper:.3g}, the champion's "
                f"{champion.mse_paper:.3g} (ratio allowed: {self.error_ratio:g})"
            )
        medians = (0.0, 0.0) if paired is None else np.median(paired.squared, axis=1)
        ratio = _MEDIAN_RATIO * self.error_ratio
        if medians[0] > ratio * medians[1] and surely(np.median, ratio):
            objections.append(
                f"half of its squared errors are above {medians[0]:.3g}, of the champion's above "
                f"{medians[1]:.3g} (ratio allowed: {ratio:g})"
            )
        if candidate.accuracy < champion.accuracy - self.accuracy_drop and _surely_above(
            None if paired is None else paired.wrong, np.mean, rise=self.accuracy_drop
        ):
            objections.append(
                f"its accuracy is {candidate.accuracy:.4%}, the champion's {champion.accuracy:.4%}"
            )
        if candidate.calibration_error > champion.calibration_error + self.calibration_rise:
            objections.append(
                f"its calibration error is {candidate.calibration_error:.4f}, the champion's "
                f"{champion.calibration_error:.4f} (rise allowed: {self.calibration_rise:g})"
            )
        return objections


def _surely_above(
    scores: Array | Mask | None, statistic: Callable[..., Any], ratio: float = 1.0, rise: float = 0
) -> bool:
    """Whether a statistic of the first row is above ratio times the second's + rise by no chance.

    True without scores of several profiles.
    """
    if scores is None or np.shape(scores)[1] < 2:
        return True
    from scipy import stats  # imported where it is needed: it takes long

    def excess(first: Array, second: Array, axis: int) -> Any:
        return statistic(first, axis=axis) - ratio * statistic(second, axis=axis) - rise

    resampled = stats.bootstrap(
        tuple(np.asarray(scores, dtype=np.float64)),
        excess,
        paired=True,
        n_resamples=1000,
        batch=100,
        alternative="greater",
        method="percentile",
        rng=0,
    )
    return bool(resampled.confidence_interval.low > 0)


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
