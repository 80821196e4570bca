"""What to expect of a model for measured profiles, from held-out simulated measurements."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from bragg_data.arrays import Array, Floats32, Integers
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_models.predictors import Prediction, Predictor
from bragg_models.targets import Targets
from pipelines.cli.style import UNITS
from pipelines.evaluation.scoring import in_batches, predict_batches

EXPECTED = "expected"  # in the facts of a model's provenance


@dataclass(frozen=True)
class Expectation:
    """Errors, intervals and decisions of a model on profiles that it was not calibrated on."""

    accuracy: float  # share of genuine profiles with the right phase
    mae: Mapping[str, float]  # of the right phase's free parameters, in Å or degrees
    relative_mae: float  # of its lengths, relative
    coverage: float  # share of its parameters that lie in their 90 % intervals
    accepted: float  # share of genuine profiles that are accepted
    rejected: float  # share of foreign profiles that are rejected

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
        errors = ", ".join(f"{name} within {v:.2g} {UNITS[name]}" for name, v in self.mae.items())
        return (
            f"{errors} on average; phase right in {self.accuracy:.1%}; {self.coverage:.0%} of the "
            f"parameters inside their 90 % intervals; genuine samples accepted in "
            f"{self.accepted:.1%}, foreign ones rejected in {self.rejected:.1%}"
        )


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
        relative_mae=float((difference / cells)[lengths].mean()) if lengths.any() else float("nan"),
        coverage=float(inside[free].mean()) if free.any() else float("nan"),
        accepted=float(np.mean(accepted)),
        rejected=rejected,
    )


def rejected_share(predictor: Predictor, profiles: Floats32) -> float:
    """Return the share of foreign profiles (n, points) that a model rejects."""
    batches = in_batches(profiles)
    prediction = predict_batches(predictor, batches, len(profiles), description="Rejecting")
    return 0.0 if prediction.accepted is None else float(1 - prediction.accepted.mean())
