"""Models and baselines on measured profiles whose phases and cells are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from bragg_data.baseline import BackgroundError, paper_preprocessed
from bragg_data.campaign import Campaign, Samples
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.pseudo_experiments import read_pseudo_experiments
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
from pipelines.evaluation.baselines import constant_answer
from pipelines.evaluation.names import CONSTANT, NEAREST, REFINED, STRUCTURE
from pipelines.evaluation.scoring import Cells, EvaluatedModel, Phases, Scorer, constant_model
from pipelines.evaluation.tables import ModelScores
from pipelines.prediction.library import PatternLibrary, match_library

FROM_LIBRARY = "the library"
"""Start of a refinement that no model's cell is added to."""

Native = tuple[Profile, Instrument | None]
"""A profile as it was read, and the measurement's own calibration if it is known."""


@dataclass(frozen=True, eq=False)
class LabelledProfiles:
    """Measured profiles on a campaign's grid, whose phases and cells are known.

    Attributes
    ----------
    name, samples, gridded
        For a reader; names of the profiles; the profiles, with their background.
    phase, cells : shapes (n,), (n, 6)
        The truth.
    native
        Reads the profiles as they were measured.
    calibrated
        Whether the measurements' own calibrations were used.
    prepared_otherwise : shape (n, points)
        Profiles prepared by another preprocessing than the project's, or None.
    """

    name: str
    samples: tuple[str, ...]
    gridded: tuple[GriddedProfile, ...]
    phase: Phases
    cells: Cells
    native: Callable[[], Sequence[Native]]
    calibrated: bool = True
    prepared_otherwise: NDArray[np.float64] | None = None

    @cached_property
    def prepared(self) -> NDArray[np.float64]:
        """The input of models and of the library match, shape (n, points).

        Raises
        ------
        PreprocessingError
            If a profile cannot be prepared, with its name.
        """
        if self.prepared_otherwise is not None:
            return self.prepared_otherwise
        rows = []
        for sample, g in zip(self.samples, self.gridded, strict=True):
            try:
                rows.append(prepare_measured(g.intensity, g.sigma, g.covered))
            except PreprocessingError as error:
                raise PreprocessingError(f"{self.name}, {sample}: {error}") from error
        return np.stack(rows)

    @property
    def covered(self) -> NDArray[np.bool_]:
        """Where each profile holds information, shape (n, points)."""
        return np.stack([g.covered for g in self.gridded])

    def select(self, rows: NDArray[np.intp]) -> LabelledProfiles:
        """Return some of the profiles, by their numbers."""
        prepared = self.prepared_otherwise
        return replace(
            self,
            samples=tuple(self.samples[row] for row in rows),
            gridded=tuple(self.gridded[row] for row in rows),
            phase=self.phase[rows],
            cells=self.cells[rows],
            native=lambda: [self.native()[row] for row in rows],
            prepared_otherwise=None if prepared is None else prepared[rows],
        )


def profiles_from_file(path: Path, campaign: Campaign) -> list[LabelledProfiles]:
    """Return pseudo-experiments twice: with their calibrations, and without.

    Raises
    ------
    ProfileError
        If the file holds none.
    """
    labelled = []
    for calibrated in (True, False):
        experiments = read_pseudo_experiments(path, campaign, calibrated=calibrated)
        native = [(e.measurement.profile, e.measurement.calibration) for e in experiments]
        labelled.append(
            LabelledProfiles(
                f"{path.stem}, calibration {'given' if calibrated else 'not given'}",
                tuple(f"{e.truth['index']}" for e in experiments),
                tuple(e.measurement.gridded for e in experiments),
                np.array([e.label.phase for e in experiments]),
                np.array([e.label.cell for e in experiments]),
                partial(list, native),
                calibrated,
            )
        )
    return labelled


def profiles_from_dataset(
    dataset: xr.Dataset, store: Store, campaign: Campaign
) -> LabelledProfiles:
    """Return the labelled profiles of a measured data set.

    Parameters
    ----------
    dataset, store, campaign
        The data set, and the store that it was opened from; the campaign whose grid it is on.

    Raises
    ------
    StoreError
        If it is a simulated one, or no sample is labelled.
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
    values = [labelled[name].values for name in ("intensity", "sigma", "covered")]
    chosen = [records[row] for row in rows]
    tag = str(dataset.attrs["tag"])

    def native() -> list[Native]:
        return [
            (native_profile(store, tag, record), _calibration(record["calibration"], campaign))
            for record in chosen
        ]

    return LabelledProfiles(
        tag,
        tuple(r["file"] + (f" bank {r['bank']}" if r["bank"] else "") for r in chosen),
        tuple(
            GriddedProfile(y.astype(np.float64), s.astype(np.float64), c)
            for y, s, c in zip(*values, strict=True)
        ),
        labels.phase,
        labels.cells,
        native,
        not any(record["nominal"] for record in chosen),
    )


def _calibration(constants: Mapping[str, float] | None, campaign: Campaign) -> Instrument | None:
    if constants is None:
        return None
    names = ("difc", "difa", "difb", "tzero")
    return campaign.instrument.with_parameters(**{name: constants[name] for name in names})


def with_paper_preprocessing(
    labelled: LabelledProfiles, campaign: Campaign
) -> tuple[LabelledProfiles, NDArray[np.intp]] | None:
    """Return the profiles that the paper's preprocessing (section V-C1) is possible for.

    Parameters
    ----------
    labelled, campaign
        Profiles, and the campaign whose grid they are on.

    Returns
    -------
    The profiles, prepared as in the paper, and their numbers among all; None if it is possible for
    none of them.
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
    numbers = np.array(rows, dtype=np.intp)
    selected = replace(
        labelled.select(numbers), gridded=tuple(gridded), prepared_otherwise=np.stack(prepared)
    )
    return selected, numbers


@dataclass(frozen=True)
class Validation:
    """The result on one set of profiles.

    Attributes
    ----------
    labelled, targets
        The profiles; phases and parameters.
    labels
        The models' names for a reader, by key.
    scores
        Of baselines and models, baselines first.
    predictions
        By the models' keys: phases (n,) and cells (n, 6), NaN of models without cells.
    """

    labelled: LabelledProfiles
    targets: Targets
    labels: Mapping[str, str]
    scores: list[ModelScores]
    predictions: dict[str, tuple[Phases, Cells]]


def validate(
    labelled: LabelledProfiles,
    targets: Targets,
    models: Sequence[EvaluatedModel],
    *,
    resamples: int = 1000,
) -> Validation:
    """Predict profiles whose cells are known, and score the predictions.

    Parameters
    ----------
    labelled, targets
        The profiles; phases and parameters.
    models, resamples
        Baselines, then models; of the bootstrap.
    """
    scorer = Scorer(models, targets)
    profiles = labelled.prepared.astype(np.float32)
    predictions = {
        model.key: (phase, np.full((len(phase), 6), np.nan) if cells is None else cells)
        for model, phase, cells in scorer.predict(profiles, labelled.phase, labelled.cells)
    }
    labels = {model.key: model.label for model in models}
    return Validation(labelled, targets, labels, scorer.scores(resamples), predictions)


def library_matches(library: PatternLibrary, sets: Sequence[LabelledProfiles]) -> list[Matches]:
    """Return the library matches of the profiles of each set, searched together."""
    matches = match_library(
        library,
        np.concatenate([labelled.prepared for labelled in sets]),
        np.concatenate([labelled.covered for labelled in sets]),
        progress=True,
    )
    ends = np.cumsum([len(labelled.samples) for labelled in sets])[:-1]
    parts = (np.split(v, ends) for v in (matches.row, matches.correlation, matches.cells))
    return [Matches(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True, eq=False)
class RefinedProfiles:
    """Refinements of a set of profiles.

    Attributes
    ----------
    phase, cells, su : shapes (n,), (n, 6), (n, 6)
        The most plausible phase, its cell, and standard uncertainties (NaN where nothing could be
        refined, 0 where not free).
    """

    phase: Phases
    cells: Cells
    su: Cells


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

    Parameters
    ----------
    campaign
        Its phases; the commonest one's CIF has the cell at room temperature.
    training
        Labels of the models' training data.
    matches
        The library matches of the profiles that are going to be predicted, or None.
    refinements
        Their refinements, by the start.
    """
    commonest, mean = constant_answer(training.phase, training.cells)
    phase = campaign.phases[commonest]
    label = f"CIF's cell ({phase.name})"
    baselines = [
        constant_model(CONSTANT, "always the mean cell", commonest, mean),
        constant_model(STRUCTURE, label, commonest, np.array(phase.cell)),
    ]

    def known(model: str, key: str, label: str, phase: Phases, cells: Cells) -> EvaluatedModel:
        return EvaluatedModel(model, key, label, lambda _: (phase, cells))

    if matches is not None:
        result = np.array(matches.phase), np.array(matches.best_cells)
        baselines.append(known(NEAREST, NEAREST, "library, nearest", *result))
    for start, fit in (refinements or {}).items():
        key = REFINED if start == FROM_LIBRARY else f"{REFINED} from {start}"
        baselines.append(known(REFINED, key, f"refined from {start}", fit.phase, fit.cells))
    return baselines
