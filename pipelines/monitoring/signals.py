"""Signals of a record of answers: what is watched, next to what the model was trained for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.campaign_file import MeasurementEffects
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.errors import first_line
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.simulation import measurement_effects
from bragg_data.simulation.kinematic import Simulator
from pipelines.prediction.acceptance import NORMAL_90
from pipelines.recording.input_statistics import statistics_of
from pipelines.recording.record import Record, RecordedAnswer
from pipelines.simulation.draws import Purpose, random_stream

WATCHED = ("width", "background")  # of the input statistics
_LENGTHS = CELL_PARAMETERS[:3]
_PER_PHASE = 200  # draws of each phase, with which the training is described


class MonitorError(ValueError):
    """A file of known cells that cannot be read, or a record with nothing to watch."""


@dataclass(frozen=True, eq=False)
class Signals:
    """What the record shows of n answers of a model, in order of time; NaN where unknown."""

    answers: Sequence[RecordedAnswer]
    logs: Mapping[str, Array]  # logarithms of the watched statistics, each (n,)
    accepted: Array  # 0 or 1, (n,)
    shift: Array  # relative shift of lengths on samples of known cells, (n,)
    shift_su: Array  # its standard uncertainty, as the model's intervals give it, (n,)

    def __len__(self) -> int:
        return len(self.answers)


# Known cells by a pattern of file names: lengths by the name of the parameter, in Å.
KnownCells = Mapping[str, Mapping[str, float]]


def read_known_cells(path: Path) -> KnownCells:
    """Read a CSV of known cells: ``file``, a name or pattern (``si_*.xye``), and a, b, c in Å.

    Raises `MonitorError` if it cannot be read.
    """
    try:
        table = pd.read_csv(path, skipinitialspace=True, dtype={"file": str})
        columns = [name for name in _LENGTHS if name in table.columns]
        cells = {
            str(row["file"]): {n: float(row[n]) for n in columns if np.isfinite(row[n])}
            for _, row in table.iterrows()
        }
    except (OSError, ValueError, KeyError) as error:
        raise MonitorError(
            f"{path} holds no known cells ({first_line(error)}). Expected: CSV with the columns "
            f"file, a and, where they differ, b and c in Å."
        ) from error
    if not columns:
        raise MonitorError(f"{path} has no column a, b or c with known lengths in Å.")
    return cells


def signals_of(record: Record, model: str | None, known: KnownCells) -> tuple[str, Signals]:
    """Return the address of a model, by default that of the newest answer, and its signals.

    Raises `MonitorError` if the record holds no answer of it.
    """
    answers = record.answers()
    documents = [json.loads(answer.answer) for answer in answers]
    if answers and model is None:
        model = documents[-1]["model"]
    rows = [row for row, document in enumerate(documents) if document["model"] == model]
    answers = [answers[row] for row in rows]
    if not answers or model is None:
        raise MonitorError(f"The record {record.folder} holds no answers of {model or 'a model'}.")
    statistics = [answer.statistics for answer in answers]
    logs = {name: _log([s[name] for s in statistics]) for name in WATCHED}
    accepted = np.array([s["accepted"] for s in statistics], dtype=np.float64)
    shifts = [_shift(documents[row], known) for row in rows]
    shift, su = np.array(shifts, dtype=np.float64).T
    return model, Signals(answers, logs, accepted, shift, su)


def _log(values: Sequence[float | None]) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.array(values, dtype=np.float64))
    return np.where(np.isfinite(logs), logs, np.nan)


def _shift(answer: Mapping[str, Any], known: KnownCells) -> tuple[float, float]:
    """Return the relative shift of an accepted answer's lengths, and its standard uncertainty."""
    name = Path(answer["file"] or "").name
    cells = (cell for pattern, cell in known.items() if fnmatchcase(name, pattern))
    cell = next(cells, None)
    intervals = answer["intervals"]
    if cell is None or answer["accepted"] is False or not intervals:
        return np.nan, np.nan
    values, weights = [], []
    for parameter, length in cell.items():
        if intervals.get(parameter):
            low, high = intervals[parameter]
            su = (high - low) / 2 / NORMAL_90 / length
            values.append(np.log(answer["cell"][parameter] / length))
            weights.append(su**-2)
    if not values:
        return np.nan, np.nan
    return float(np.average(values, weights=weights)), float(np.sum(weights) ** -0.5)


@dataclass(frozen=True, eq=False)
class Training:
    """The draws of a campaign, with its own or other measurement effects, always the same."""

    campaign: Campaign
    simulator: Simulator
    per_phase: int = _PER_PHASE

    @classmethod
    def of(cls, campaign: Campaign, per_phase: int = _PER_PHASE) -> "Training":
        """Return the draws of a campaign."""
        return cls(campaign, measurement_effects.simulator_for(campaign), per_phase)

    def logs(self, effects: MeasurementEffects | None = None) -> Mapping[str, Array]:
        """Return logarithms of the watched statistics of draws, each (n,)."""
        generator = np.random.default_rng(random_stream(Purpose.MONITORING, 0))
        labels = measurement_effects.draw_labels(self.campaign, self.per_phase, generator)
        drawn = effects or self.campaign.measurement_effects
        draws = measurement_effects.draw_profiles(self.simulator, *labels, generator, drawn)
        prepared = draws.prepared()
        gridded = [
            GriddedProfile(*values)
            for values in zip(draws.intensity, draws.sigma, draws.covered, strict=True)
        ]
        rows = statistics_of(prepared, self.campaign.grid.relative_step, gridded)
        return {name: _log([row[name] for row in rows]) for name in WATCHED}
