"""Models and baselines asked about measured profiles whose cells are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.campaign import Campaign, Samples
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.measurement.pseudo_experiments import read_pseudo_experiments
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import prepare_measured
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.rietveld import Refiner
from bragg_data.store.measured import measurement_records
from bragg_data.store.repository import StoreError
from bragg_data.store.schema import samples_of
from bragg_models.library.search import Matches
from bragg_models.metrics import prediction_sets
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation.baselines import constant_answer
from pipelines.evaluation.scoring import CONSTANT, NEAREST, Answers, Tally, ask_and_count, scored
from pipelines.evaluation.summary import CLASS_CONDITIONAL, CLASSIFIER, INTEGER
from pipelines.evaluation.tables import (
    PAPER_CAMPAIGN,
    Score,
    Sheet,
    class_conditional_sheet,
    integrated_sheet,
)
from pipelines.prediction.predict import Library, match

Cells = NDArray[np.float64]
Phases = NDArray[np.integer]
Ask = Callable[[NDArray[np.float32]], tuple[Phases, Cells | None]]

STRUCTURE = "structure"
"""Name of the baseline that answers the CIF's cell."""

REFINED = "refined"
"""Name of whole-pattern refinement among those who answer."""

FROM_LIBRARY = "the library"
"""From where a refinement begins if no model says more."""


@dataclass(frozen=True, eq=False)
class Known:
    """Measured profiles on a campaign's grid, whose phases and cells are known.

    Attributes
    ----------
    name
        What is shown.
    samples
        What each profile is called.
    gridded
        The profiles, with their background.
    phase, cells : shapes (n,), (n, 6)
        What they are.
    calibrated
        Whether the measurements' own calibrations were used.
    """

    name: str
    samples: tuple[str, ...]
    gridded: tuple[GriddedProfile, ...]
    phase: Phases
    cells: Cells
    calibrated: bool = True

    @cached_property
    def prepared(self) -> NDArray[np.float64]:
        """What models are asked about, shape (n, points)."""
        g = self.gridded
        return np.stack([prepare_measured(one.intensity, one.sigma, one.covered) for one in g])

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Where each profile holds information, shape (n, points)."""
        return np.stack([one.covered for one in self.gridded])


def known_from_file(path: Path, campaign: Campaign) -> list[Known]:
    """Return pseudo-experiments twice: with the calibration given, and without.

    Raises
    ------
    ProfileError
        If the file holds none.
    """
    sets = []
    for calibrated in (True, False):
        found = read_pseudo_experiments(path, campaign, calibrated=calibrated)
        sets.append(
            Known(
                f"{path.stem}, calibration {'given' if calibrated else 'not given'}",
                tuple(f"{one.truth['index']}" for one in found),
                tuple(one.measurement.gridded for one in found),
                np.array([one.label.phase for one in found]),
                np.array([one.label.cell for one in found]),
                calibrated,
            )
        )
    return sets


def known_from_dataset(dataset: xr.Dataset) -> Known:
    """Return the labelled profiles of a measured data set.

    Raises
    ------
    StoreError
        If it is a simulated one, or nothing in it is labelled.
    """
    told = measurement_records(dataset)
    rows = np.flatnonzero(dataset.phase.values >= 0)
    if not len(rows):
        raise StoreError(
            f"No sample of {dataset.attrs['tag']} is labelled, so nothing can be compared. Ingest "
            f"it again with --labels."
        )
    some = dataset.isel(sample=rows)
    labels = samples_of(some)
    values = [some[name].values for name in ("intensity", "sigma", "covered")]
    return Known(
        dataset.attrs["tag"],
        tuple(
            told[row]["file"] + (f" bank {told[row]['bank']}" if told[row]["bank"] else "")
            for row in rows
        ),
        tuple(
            GriddedProfile(y.astype(np.float64), s.astype(np.float64), c)
            for y, s, c in zip(*values, strict=True)
        ),
        labels.phase,
        labels.cells,
        not any(told[row]["nominal"] for row in rows),
    )


@dataclass
class Validation:
    """What was found on one set of profiles.

    Attributes
    ----------
    known
        The profiles.
    scores
        Of everyone, baselines first.
    answers
        By what everyone is listed under: phases (n,) and cells (n, 6), NaN from those without.
    """

    known: Known
    scores: list[Score]
    answers: dict[str, tuple[Phases, Cells]] = field(default_factory=dict)

    def sheets(self, targets: Targets, campaign: str) -> list[Sheet]:
        """Return Tables IV and V, and a table of every sample."""
        count = len(self.known.samples)
        title = f"{self.known.name}, {count} profile{'s' * (count != 1)}"
        first = [s for s in self.scores if not s.uri]
        conditional = [s for s in self.scores if s.model in (CLASSIFIER, *CLASS_CONDITIONAL)]
        others = [s for s in self.scores if s.uri and s not in conditional and s.model != INTEGER]
        of_paper = campaign == PAPER_CAMPAIGN
        return [
            class_conditional_sheet(
                title, [*first, *conditional], targets, of_paper=of_paper, measured=True
            ),
            integrated_sheet(title, [*first, *others], targets, of_paper=of_paper, measured=True),
        ]

    def samples_sheet(self, targets: Targets, labels: Mapping[str, str]) -> Sheet:
        """Return every sample's truth and answers: system, then errors of what is free."""
        names = list(self.answers)
        sheet = Sheet(
            f"Every sample: {self.known.name} (system if it is wrong; errors in 1e-4 Å and 0.01°)",
            ("sample", "truth", *(labels.get(name, name) for name in names)),
        )
        for row, sample in enumerate(self.known.samples):
            code = int(self.known.phase[row])
            free = [k for k, used in enumerate(targets.free[code]) if used]
            parameters = [targets.parameters[k] for k in free]
            truth = ", ".join(
                f"{p} {self.known.cells[row, CELL_PARAMETERS.index(p)]:.4f}" for p in parameters
            )
            texts = []
            for name in names:
                phase, cells = self.answers[name]
                wrong = "" if phase[row] == code else f"{targets.names[phase[row]]} "
                errors = [
                    cells[row, CELL_PARAMETERS.index(p)]
                    - self.known.cells[row, CELL_PARAMETERS.index(p)]
                    for p in parameters
                ]
                told = " ".join(
                    f"{e * (1e4 if p in 'abc' else 1e2):+.1f}"
                    for e, p in zip(errors, parameters, strict=True) if np.isfinite(e)
                )  # fmt: skip
                texts.append(f"{wrong}{told}")
            sheet.add(sample, f"{targets.names[code]} {truth}", *texts)
        return sheet

    def to_json(self, targets: Targets) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.known.name,
            "models": {
                s.label: {"uri": s.uri, "groups": {g: dict(v) for g, v in s.groups.items()}}
                for s in self.scores
            },
            "samples": [
                {
                    "sample": sample,
                    "truth": _told(targets, self.known.phase[row], self.known.cells[row]),
                    "answers": {
                        name: _told(targets, phase[row], cells[row])
                        for name, (phase, cells) in self.answers.items()
                    },
                }
                for row, sample in enumerate(self.known.samples)
            ],
        }


def _told(targets: Targets, phase: int, cell: NDArray[np.float64]) -> dict[str, Any]:
    values = {n: float(v) if np.isfinite(v) else None
              for n, v in zip(CELL_PARAMETERS, cell, strict=True)}  # fmt: skip
    return {"phase": targets.names[phase], "cell": values}


def library_matches(library: Library, sets: Sequence[Known]) -> list[Matches]:
    """Return the library matches of the profiles of each set, found in one go."""
    found = match(
        library,
        np.concatenate([one.prepared for one in sets]),
        np.concatenate([one.covered for one in sets]),
        progress=True,
    )
    ends = np.cumsum([len(one.samples) for one in sets])[:-1]
    parts = (np.split(v, ends) for v in (found.row, found.correlation, found.cells))
    return [Matches(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True, eq=False)
class Refinement:
    """What refinements of a set of profiles come to.

    Attributes
    ----------
    phase, cells, su : shapes (n,), (n, 6), (n, 6)
        The most plausible phase, its cell, and standard uncertainties (NaN where nothing could be
        refined, 0 where not free).
    """

    phase: Phases
    cells: Cells
    su: Cells


def refined(
    known: Known, matches: Matches, refiner: Refiner, model: Predictor | None = None
) -> Refinement:
    """Refine every profile of a set from its library matches, and from a model's cell if given.

    What cannot be refined keeps its library match.
    """
    nothing = np.full((len(known.phase), 6), np.nan)
    found = Refinement(np.array(matches.phase), np.array(matches.best_cells), nothing)
    calibrated = np.full(len(known.phase), known.calibrated)
    told = None if model is None else model.predict(known.prepared, calibrated=calibrated)
    with Progress("Refining", len(known.phase), "profiles") as progress:
        for row, gridded in enumerate(known.gridded):
            starts = matches.starts(row)
            if told is not None:
                starts.append((int(told.phase[row]), told.cells[row]))
            with suppress(RefinementError):
                best = refiner.refine(gridded, starts, tzero=not known.calibrated)[0]
                found.phase[row], found.cells[row] = best.phase, best.cell
                found.su[row] = best.su
            progress.advance()
    return found


def refinement_sheet(known: Known, targets: Targets, fits: Mapping[str, Refinement]) -> Sheet:
    """Return errors of refinements, and how they compare with the uncertainties that they state.

    Parameters
    ----------
    known
        Profiles.
    targets
        Phases and parameters.
    fits
        By from where they began.
    """
    sheet = Sheet(
        f"Refined: {known.name}, {len(known.samples)} profiles (mean errors of those whose system "
        f"is right)",
        ("from", "systems right", *(f"{n} ({'Å' if n in 'abc' else '°'})"
                                    for n in targets.parameters),
         "errors / su,\nspread", "within 2 su"),
    )  # fmt: skip
    for label, fit in fits.items():
        right = fit.phase == known.phase
        errors = np.abs(fit.cells - known.cells)
        texts, ratios = [], []
        for column, name in enumerate(targets.parameters):
            own = right & targets.free[known.phase, column]
            place = CELL_PARAMETERS.index(name)
            texts.append(f"{errors[own, place].mean():.1e}" if own.any() else "")
            some = own & (fit.su[:, place] > 0)
            ratios.append(errors[some, place] / fit.su[some, place])
        ratio = np.concatenate(ratios)
        spread = [f"{np.sqrt(np.mean(ratio**2)):.2f}", f"{np.mean(ratio < 2):.0%}"]
        sheet.add(
            label, f"{right.sum()} of {len(right)}", *texts, *(spread if len(ratio) else ("", ""))
        )
    return sheet


def sureness_sheet(known: Known, targets: Targets, asked: Mapping[str, Predictor]) -> Sheet | None:
    """Return how right models are in how sure they are, for those that tell; None if none does.

    Parameters
    ----------
    known
        Profiles.
    targets
        Phases and parameters.
    asked
        Models by what they are called.
    """
    sheet = Sheet(
        f"Intervals and verdicts: {known.name}, {len(known.samples)} profiles",
        ("model", "truth in the 90 % set", "size of the set", "accepted",
         *(f"{name} inside its interval" for name in targets.parameters)),
    )  # fmt: skip
    calibrated = np.full(len(known.samples), known.calibrated)
    for label, predictor in asked.items():
        if not predictor.has_intervals:
            continue
        told = predictor.predict(known.prepared, calibrated=calibrated)
        assert told.intervals is not None
        assert told.accepted is not None
        size, kept = prediction_sets(told.probabilities, known.phase)
        right = told.phase == known.phase
        inside = (known.cells >= told.intervals[..., 0]) & (known.cells <= told.intervals[..., 1])
        texts = []
        for column, name in enumerate(targets.parameters):
            own = right & targets.free[known.phase, column]
            texts.append(f"{inside[own, CELL_PARAMETERS.index(name)].sum()} of {own.sum()}")
        sheet.add(
            label, f"{kept.sum()} of {len(kept)}", f"{size.mean():.2f}",
            f"{told.accepted.sum()} of {len(kept)}", *texts,
        )  # fmt: skip
    return sheet if sheet.rows else None


def baselines(
    campaign: Campaign,
    training: Samples,
    matches: Matches | None,
    refinements: Mapping[str, Refinement] | None = None,
) -> list[Answers]:
    """Return those who answer without having learnt.

    Two constants, the library match, and the refinement from it.

    Parameters
    ----------
    campaign
        Its phases; the commonest one's CIF has the cell at room temperature.
    training
        Labels of what models learnt from.
    matches
        The library's, of the profiles that are going to be asked about, or None.
    refinements
        What :func:`refined` found for them, by from where it began.
    """
    commonest, mean = constant_answer(training.phase, training.cells)
    phase = campaign.phases[commonest]

    def constant(cell: NDArray[np.float64]) -> Ask:
        return lambda profiles: (
            np.full(len(profiles), commonest), np.tile(cell, (len(profiles), 1)),
        )  # fmt: skip

    told = [
        Answers(CONSTANT, CONSTANT, "always the mean cell", constant(mean)),
        Answers(STRUCTURE, STRUCTURE, f"CIF's cell ({phase.name})", constant(np.array(phase.cell))),
    ]
    if matches is not None:
        nearest = partial(_answered, np.array(matches.phase), np.array(matches.best_cells))
        told.append(Answers(NEAREST, NEAREST, "library, nearest", nearest))
    for label, fit in (refinements or {}).items():
        key = REFINED if label == FROM_LIBRARY else f"{REFINED} from {label}"
        always = partial(_answered, fit.phase, fit.cells)
        told.append(Answers(REFINED, key, f"refined from {label}", always))
    return told


def _answered(phase: Phases, cells: Cells, _: NDArray[np.float32]) -> tuple[Phases, Cells | None]:
    """Return answers that are known beforehand."""
    return phase, cells


def validate(
    known: Known, targets: Targets, asked: Sequence[Answers], *, resamples: int = 1000
) -> Validation:
    """Ask everyone about known profiles, and score the answers.

    Parameters
    ----------
    known
        The profiles.
    targets
        Phases and parameters.
    asked
        Baselines, then models.
    resamples
        Of the bootstrap.
    """
    tallies: dict[str, Tally] = {}
    answers: dict[str, tuple[Phases, Cells]] = {}
    profiles = known.prepared.astype(np.float32)
    for one in asked:
        phase, cells = ask_and_count(one, profiles, known.phase, known.cells, tallies, targets)
        answers[one.key] = phase, np.full((len(phase), 6), np.nan) if cells is None else cells
    scores = scored(asked, tallies, known.phase, targets, resamples)
    return Validation(known, scores, answers)
