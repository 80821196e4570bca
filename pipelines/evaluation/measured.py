"""Models and baselines on measured profiles whose phases and cells are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Indices
from bragg_data.baseline import BackgroundError, paper_preprocessed
from bragg_data.campaign import Campaign, Samples
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.load import read_pseudo_experiments
from bragg_data.measurement.readers import Profile, ProfileError
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.preprocessing import PreprocessingError, prepare_measured
from bragg_data.refinement.result import RefinementError
from bragg_data.refinement.rietveld import Refiner
from bragg_data.store.measured import measurement_records, native_profile
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import samples_of
from bragg_models.library.search import Matches
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.console import Progress
from pipelines.evaluation import scoring
from pipelines.evaluation.names import CONSTANT, NEAREST, REFINED, STRUCTURE
from pipelines.evaluation.scoring import Cells, EvaluatedModel, Phases, constant_model
from pipelines.evaluation.tables import ModelScores
from pipelines.prediction.library import PatternLibrary, match_library

FROM_LIBRARY = "the library"  # start of a refinement that no model's cell is added to
# A profile as it was read, and the measurement's own calibration if it is known.
Native = tuple[Profile, Instrument | None]


@dataclass(frozen=True, eq=False)
class LabelledProfiles:
    """Measured profiles on a campaign's grid, whose phases and cells are known."""

    name: str  # for a reader
    samples: tuple[str, ...]  # names of the profiles
    gridded: tuple[GriddedProfile, ...]  # with their background
    phase: Phases  # the truth, shape (n,)
    cells: Cells  # the truth, shape (n, 6)
    native: Callable[[], Sequence[Native]]  # reads the profiles as they were measured
    calibrated: bool  # whether the measurements' own calibrations were used
    prepared: Array  # input of models and of the library match, shape (n, points)

    def select(self, rows: Indices) -> LabelledProfiles:
        """Return some of the profiles, by their numbers."""
        return replace(
            self,
            samples=tuple(self.samples[row] for row in rows),
            gridded=tuple(self.gridded[row] for row in rows),
            phase=self.phase[rows],
            cells=self.cells[rows],
            native=lambda: [self.native()[row] for row in rows],
            prepared=self.prepared[rows],
        )


def profiles_from_file(path: Path, campaign: Campaign) -> list[LabelledProfiles]:
    """Return pseudo-experiments twice: with their calibrations, and without.

    Raises `ProfileError` if the file holds none.
    """
    labelled = []
    for calibrated in (True, False):
        experiments = read_pseudo_experiments(path, campaign, calibrated=calibrated)
        measurements = [e.measurement for e in experiments]
        labelled.append(
            LabelledProfiles(
                f"{path.stem}, calibration {'given' if calibrated else 'not given'}",
                tuple(f"{e.truth['index']}" for e in experiments),
                tuple(m.gridded for m in measurements),
                np.array([e.label.phase for e in experiments]),
                np.array([e.label.cell for e in experiments]),
                partial(list, [(m.profile, m.calibration) for m in measurements]),
                calibrated,
                np.stack([m.prepared for m in measurements]),
            )
        )
    return labelled


def profiles_from_dataset(
    dataset: xr.Dataset, store: Store, campaign: Campaign
) -> LabelledProfiles:
    """Return the labelled profiles of a measured data set of a store, on a campaign's grid.

    Raises `StoreError` or `PreprocessingError` if it is a simulated one, or no sample is labelled;
    if a profile has no signal.
    """
    records = measurement_records(dataset)
    rows = np.flatnonzero(dataset.phase.values >= 0)
    if not len(rows):
        raise StoreError(
            f"No sample of {dataset.attrs['tag']} is labelled, so nothing can be compared. Ingest "
            f"it again with --labels."
        )
    labelled = dataset.isel(sample=rows)
    labels = samples_of(labelled)
    intensity, sigma = (labelled[name].values.astype(np.float64) for name in ("intensity", "sigma"))
    chosen = [records[row] for row in rows]
    tag = str(dataset.attrs["tag"])

    def calibration(constants: Mapping[str, float] | None) -> Instrument | None:
        if constants is None:
            return None
        names = ("difc", "difa", "difb", "tzero")
        return campaign.instrument.with_parameters(**{name: constants[name] for name in names})

    samples = tuple(r["file"] + (f" bank {r['bank']}" if r["bank"] else "") for r in chosen)
    gridded = tuple(map(GriddedProfile, intensity, sigma, labelled["covered"].values))
    prepared = []
    for sample, g in zip(samples, gridded, strict=True):
        try:
            prepared.append(prepare_measured(g.intensity, g.sigma, g.covered))
        except PreprocessingError as error:
            raise PreprocessingError(f"{tag}, {sample}: {error}") from error
    return LabelledProfiles(
        tag,
        samples,
        gridded,
        labels.phase,
        labels.cells,
        lambda: [(native_profile(store, tag, r), calibration(r["calibration"])) for r in chosen],
        not any(record["nominal"] for record in chosen),
        np.stack(prepared),
    )


def with_paper_preprocessing(
    labelled: LabelledProfiles, campaign: Campaign
) -> tuple[LabelledProfiles, Indices] | None:
    """Return the profiles that the paper's preprocessing (section V-C1) is possible for.

    They are prepared in that way, and come with their numbers among all; None if there are none.
    """
    rows, prepared, gridded = [], [], []
    for row, (profile, calibration) in enumerate(labelled.native()):
        try:
            values, covered = paper_preprocessed(
                profile, campaign.grid, campaign.instrument, calibration
            )
        except (BackgroundError, PreprocessingError, ProfileError):
            continue
        rows.append(row)
        prepared.append(values)
        gridded.append(replace(labelled.gridded[row], covered=covered))
    if not rows:
        return None
    chosen = np.array(rows, dtype=np.intp)
    selected = replace(labelled.select(chosen), gridded=tuple(gridded), prepared=np.stack(prepared))
    return selected, chosen


@dataclass(frozen=True)
class Validation:
    """The result on one set of profiles."""

    labelled: LabelledProfiles
    targets: Targets
    labels: Mapping[str, str]  # names for a reader, by the models' keys
    scores: list[ModelScores]  # of baselines, then of models
    # Phases (n,) and cells (n, 6), NaN of models without cells, by the models' keys.
    predictions: dict[str, tuple[Phases, Cells]]


def validate(
    labelled: LabelledProfiles, targets: Targets, models: Sequence[EvaluatedModel], resamples: int
) -> Validation:
    """Predict profiles with baselines, then models, and score them, with bootstrap resamples."""
    predictions = {}

    def add(model: EvaluatedModel, phase: Phases, cells: Cells | None) -> None:
        cells = np.full((len(phase), 6), np.nan) if cells is None else cells
        predictions[model.key] = phase, cells

    batch = labelled.prepared.astype(np.float32), labelled.phase, labelled.cells
    scores = scoring.score_models(models, targets, [batch], resamples, add)
    labels = {model.key: model.label for model in models}
    return Validation(labelled, targets, labels, scores, predictions)


def library_matches(library: PatternLibrary, sets: Sequence[LabelledProfiles]) -> list[Matches]:
    """Return the library matches of the profiles of each set, searched together."""
    matches = match_library(
        library,
        np.concatenate([labelled.prepared for labelled in sets]),
        np.stack([g.covered for labelled in sets for g in labelled.gridded]),
        progress=True,
    )
    ends = np.cumsum([len(labelled.samples) for labelled in sets])[:-1]
    parts = (np.split(v, ends) for v in (matches.row, matches.correlation, matches.cells))
    return list(map(Matches, *parts))


@dataclass(frozen=True, eq=False)
class RefinedProfiles:
    """Refinements of n profiles: the most plausible phase of each, its cell and uncertainties."""

    phase: Phases  # shape (n,)
    cells: Cells  # shape (n, 6)
    su: Cells  # shape (n, 6); NaN where nothing could be refined, 0 where not free


def refine_profiles(
    labelled: LabelledProfiles, matches: Matches, refiner: Refiner, model: Predictor | None = None
) -> RefinedProfiles:
    """Refine every profile of a set from its library matches, and from a model's cell if given.

    A profile that cannot be refined keeps its library match.
    """
    n = len(labelled.phase)
    phase, cells = np.array(matches.phase), np.array(matches.best_cells)
    su = np.full((n, 6), np.nan)
    prediction = None
    if model is not None:
        calibrated = np.full(n, labelled.calibrated)
        prediction = model.predict(labelled.prepared, calibrated=calibrated)
    with Progress("Refining", n, "profiles") as progress:
        for row, gridded in enumerate(labelled.gridded):
            starts = matches.starts(row)
            if prediction is not None:
                starts.append((int(prediction.phase[row]), prediction.cells[row]))
            with suppress(RefinementError):
                best = refiner.refine(gridded, starts, tzero=not labelled.calibrated)[0]
                phase[row], cells[row], su[row] = best.phase, best.cell, best.su
            progress.advance()
    return RefinedProfiles(phase, cells, su)


def measured_baselines(
    campaign: Campaign,
    training: Samples,
    matches: Matches | None,
    refinements: Mapping[str, RefinedProfiles] | None = None,
) -> list[EvaluatedModel]:
    """Return the baselines: two constants, the library match, and the refinement from it.

    The CIF of the campaign's commonest phase has the cell at room temperature; ``training`` are
    the labels of the models' training data. Matches and refinements, by their start, are of the
    profiles that are going to be predicted.
    """
    commonest, mean = scoring.constant_answer(training.phase, training.cells)
    phase = campaign.phases[commonest]
    label = f"CIF's cell ({phase.name})"
    baselines = [
        constant_model(CONSTANT, "always the mean cell", commonest, mean),
        constant_model(STRUCTURE, label, commonest, np.array(phase.cell)),
    ]

    def add(model: str, key: str, label: str, phase: Phases, cells: Cells) -> None:
        baselines.append(EvaluatedModel(model, key, label, lambda _: (phase, cells)))

    if matches is not None:
        nearest = np.array(matches.phase), np.array(matches.best_cells)
        add(NEAREST, NEAREST, "library, nearest", *nearest)
    for start, fit in (refinements or {}).items():
        key = REFINED if start == FROM_LIBRARY else f"{REFINED} from {start}"
        add(REFINED, key, f"refined from {start}", fit.phase, fit.cells)
    return baselines
