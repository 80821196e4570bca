"""Evidence for and against a prediction, which the report puts in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.linear_fit import explained_fraction
from pipelines.prediction.acceptance import parameter_ranges
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import PredictedProfile
from pipelines.report.fits import CandidateFit, Misfit

CONFIDENT = 0.95
"""Probability from which a model counts as confident."""

WELL, PARTLY = 0.9, 0.5
"""Fractions of the weighted signal above the background, from which a pattern explains the peaks.
"""


@dataclass(frozen=True)
class TrainingRange:
    """A predicted cell parameter, and the ranges that the model was trained on."""

    name: str
    value: float
    ranges: list[tuple[float, float]]

    @property
    def contains_value(self) -> bool:
        """Whether the value is in one of the ranges."""
        return any(low <= self.value <= high for low, high in self.ranges)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence for and against a prediction.

    Attributes
    ----------
    confident
        Whether the model is confident: a high probability, and every cell parameter determined.
    library
        The best library match, or None.
    difference
        Its cell minus the predicted one, for the free parameters.
    explained, grade
        Fraction of the signal that the cell explains, or None; ``good``, ``care`` or ``against``.
    rival, fits_best
        The best fit of another phase, and whether the predicted one is at least as good.
    n_places, n_foreign
        Misfits, and those of them without a reflection nearby.
    ranges
        Ranges of training of each free parameter.
    """

    confident: bool
    library: CandidateFit | None
    difference: dict[str, float]
    explained: float | None
    grade: str
    rival: CandidateFit | None
    fits_best: bool
    n_places: int
    n_foreign: int
    ranges: list[TrainingRange]

    @property
    def is_inside(self) -> bool:
        """Whether all parameters are inside their ranges of training."""
        return all(entry.contains_value for entry in self.ranges)


def collect_evidence(
    profile: PredictedProfile,
    result: PredictionResult,
    fits: Sequence[CandidateFit],
    places: Sequence[Misfit],
) -> Evidence:
    """Return the evidence for and against a prediction.

    Parameters
    ----------
    profile, result
        The prediction, as arrays and as plain values.
    fits
        Fits of the refined, the predicted and the library's cells.
    places
        Misfits of the best of them.
    """
    model_fit = next((fit for fit in fits if fit.source == "model"), None)
    # The refinement, where there is one, is the best that the prediction can do.
    judged = next((fit for fit in fits if fit.source != "library" and fit.pattern_fit), model_fit)
    library = [fit for fit in fits if fit.source == "library"]
    rivals = [
        (fit.pattern_fit.rwp, fit)
        for fit in library
        if fit.pattern_fit and fit.phase != profile.phase
    ]
    rwp, rival = min(rivals, key=lambda pair: pair[0], default=(np.inf, None))
    pattern_fit = judged.pattern_fit if judged else None
    explained = explained_fraction(pattern_fit) if pattern_fit else None
    return Evidence(
        confident=result.probability >= CONFIDENT and not result.not_determined,
        library=library[0] if library else None,
        difference={
            name: float(library[0].cell[k] - profile.cell[k])
            for k, name in enumerate(CELL_PARAMETERS)
            if model_fit and library and name in profile.phase.lattice.free_parameters
        },
        explained=explained,
        grade=_grade(explained),
        rival=rival,
        fits_best=pattern_fit is not None and pattern_fit.rwp <= rwp,
        n_places=len(places),
        n_foreign=sum(not place.hkl for place in places),
        ranges=_training_ranges(profile) if model_fit else [],
    )


def _grade(explained: float | None) -> str:
    if explained is None or explained < PARTLY:
        return "against"
    return "good" if explained >= WELL else "care"


def _training_ranges(profile: PredictedProfile) -> list[TrainingRange]:
    ranges = parameter_ranges(profile.campaign, int(profile.prediction.phase[profile.row]))
    return [
        TrainingRange(name, float(profile.cell[CELL_PARAMETERS.index(name)]), of_name)
        for name, of_name in ranges.items()
    ]
