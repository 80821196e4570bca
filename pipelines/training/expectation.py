"""What to expect of a model for measured profiles, from held-out simulated measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Self

import numpy as np

from bragg_data.arrays import Array, Floats32, Integers
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_models.predictors import Prediction, Predictor
from bragg_models.targets import Targets
from pipelines.cli.style import UNITS
from pipelines.evaluation.scoring import in_batches, predict_batches

_DECIDED = 0.9  # probability of a phase, of it and another one, with which a profile decides for it
_NEARLY_ALL = 0.99
EXPECTED = "expected"  # in the facts of a model's provenance


@dataclass(frozen=True)
class Expectation:
    """Errors, intervals and decisions of a model on profiles that it was not calibrated on."""

    accuracy: float  # share of genuine profiles with the right phase
    mae: Mapping[str, float]  # of the right phase's free parameters, in Å or degrees
    relative_mae: float | None  # of its lengths, relative; None if no phase is right
    coverage: float | None  # share of its parameters that lie in their 90 % intervals
    accepted: float  # share of genuine profiles that are accepted
    rejected: float  # share of foreign profiles that are rejected
    # Share of the profiles of either phase that decide between the two, by the names of pairs of
    # which not nearly all do.
    undecided: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the values of :meth:`to_json`."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by name, for MLflow."""
        return {n: v for n, v in vars(self).items() if isinstance(v, float)}

    def __str__(self) -> str:
        """Return one sentence for a reader."""
        decisions = (
            f"phase right in {self.accuracy:.1%}; genuine samples accepted in {self.accepted:.1%}, "
            f"foreign ones rejected in {self.rejected:.1%}"
        )
        if self.coverage is None:
            return decisions
        errors = ", ".join(f"{name} within {v:.2g} {UNITS[name]}" for name, v in self.mae.items())
        inside = f"{self.coverage:.0%} of the parameters inside their 90 % intervals"
        return f"{errors} on average; {inside}; {decisions}"


def expectation(
    targets: Targets, prediction: Prediction, phase: Integers, cells: Array, rejected: float
) -> Expectation:
    """Return what predictions of genuine profiles show, by their true phases (n,), cells (n, 6)."""
    right = prediction.phase == phase
    difference = np.abs(prediction.cells - cells)
    free = np.array([lattice.free_mask for lattice in targets.lattices])[phase] & right[:, None]
    lengths = free & (np.arange(6) < 3)
    intervals = prediction.intervals
    inside = np.zeros_like(free)
    if intervals is not None:
        inside = (intervals[..., 0] <= cells) & (cells <= intervals[..., 1])
    accepted = np.ones(len(phase)) if prediction.accepted is None else prediction.accepted
    columns = {name: CELL_PARAMETERS.index(name) for name in targets.parameters}
    return Expectation(
        accuracy=float(right.mean()),
        mae={
            n: float(difference[free[:, k], k].mean())
            for n, k in columns.items()
            if free[:, k].any()
        },
        relative_mae=float((difference / cells)[lengths].mean()) if lengths.any() else None,
        coverage=float(inside[free].mean()) if free.any() else None,
        accepted=float(np.mean(accepted)),
        rejected=rejected,
        undecided=undecided_pairs(targets.names, prediction.probabilities, phase),
    )


def undecided_pairs(
    names: Sequence[str], probabilities: Array, phase: Integers
) -> dict[str, float]:
    """Return the share of profiles that decide between two phases, of pairs where some do not.

    Of the profiles (n,) of either phase by their probabilities (n, n_phases).
    """
    shares = {}
    for first, second in combinations(range(len(names)), 2):
        rows = (phase == first) | (phase == second)
        true, of_pair = phase[rows], probabilities[rows][:, [first, second]]
        of_true = np.where(true == first, of_pair[:, 0], of_pair[:, 1])
        decided = of_true >= _DECIDED * of_pair.sum(axis=1)
        if rows.any() and decided.mean() < _NEARLY_ALL:
            shares[f"{names[first]} and {names[second]}"] = float(decided.mean())
    return shares


def rejected_share(predictor: Predictor, profiles: Floats32) -> float:
    """Return the share of foreign profiles (n, points) that a model rejects."""
    batches = in_batches(profiles)
    prediction = predict_batches(predictor, batches, len(profiles), description="Rejecting")
    return 0.0 if prediction.accepted is None else float(1 - prediction.accepted.mean())
