"""From measured files to predictions: read, resample to the model's grid, predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.measurement.readers import ProfileError
from bragg_data.preprocessing import PreprocessingError
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_data.refinement.result import RefinementResult
from bragg_models.library.search import LibraryError, Matches
from bragg_models.predictors import Prediction, Predictor, PredictorError
from catalog import registry
from catalog.tracking import Tracking
from pipelines.cli.options import ProfileOptions
from pipelines.prediction.acceptance import assess_acceptance, estimate_intervals
from pipelines.prediction.library import PatternLibrary, match_library, match_result
from pipelines.prediction.result import Cell, PredictionResult, RefinedPhase, Refinement
from pipelines.registry.registration import load_version

PROFILE_SUFFIXES = (".gsa", ".gss", ".gda", ".fxye", ".xye", ".xy", ".dat")
"""Suffixes of profiles in a folder; a file that is named may have any."""


class PredictError(ValueError):
    """A request for predictions that cannot be met."""


FILE_ERRORS = (
    ProfileError,
    InstrumentError,
    PreprocessingError,
    LibraryError,
    PredictorError,
    PredictError,
)
"""Errors that concern one file and leave the results of the others."""


@dataclass(frozen=True, eq=False)
class PredictedProfile:
    """A measured profile with its prediction, as arrays; :meth:`result` returns plain values.

    Attributes
    ----------
    measurement
        The profile on the campaign's grid.
    prediction, row
        Predictions of a batch, and the row of this profile.
    campaign, model
        The model's campaign, and its address.
    snapshot
        Tag of the library.
    matches
        Library matches of the batch, or None.
    refined
        Refinements, the most plausible phase first.
    notes
        Warnings in addition to those of the measurement.
    """

    measurement: Measurement
    prediction: Prediction
    row: int
    campaign: Campaign
    model: str
    snapshot: str
    matches: Matches | None = None
    refined: tuple[RefinementResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the campaign."""
        return tuple(self.campaign.phases)

    @property
    def phase(self) -> Phase:
        """The predicted phase."""
        return self.phases[int(self.prediction.phase[self.row])]

    @property
    def cell(self) -> NDArray[np.float64]:
        """The predicted cell, shape (6,); NaN from a model that classifies only."""
        return np.asarray(self.prediction.cells[self.row])

    def result(self) -> PredictionResult:
        """Return the prediction as plain values."""
        profile, matches = self.measurement.profile, self.matches
        return replace(
            result_from_prediction(
                self.prediction, self.row, self.campaign, self.model, self.refined
            ),
            file=profile.source,
            bank=profile.bank,
            warnings=(*self.measurement.warnings, *self.notes),
            library_match=None
            if matches is None
            else match_result(matches, self.row, self.phases, self.snapshot),
        )


def result_from_prediction(
    prediction: Prediction,
    row: int,
    campaign: Campaign,
    model: str,
    refined: Sequence[RefinementResult] = (),
) -> PredictionResult:
    """Return one row of a model's predictions as plain values.

    Parameters
    ----------
    prediction, row
        Predictions of a batch, and the row.
    campaign, model
        The model's campaign, and its address.
    refined
        Refinements of the profile, the most plausible phase first.
    """
    phases = campaign.phases
    phase = phases[int(prediction.phase[row])]
    probabilities = zip(phases, prediction.probabilities[row], strict=True)
    return PredictionResult(
        crystal_system=phase.crystal_system.name,
        phase=phase.name,
        probabilities={phase.name: float(value) for phase, value in probabilities},
        cell=Cell.from_array(prediction.cells[row]),
        model=model,
        interval_estimates=estimate_intervals(prediction, row, campaign),
        acceptance=assess_acceptance(prediction, row, refined),
        refined=Refinement(tuple(_refined_phase(fit, phases[fit.phase]) for fit in refined))
        if refined
        else None,
    )


def _refined_phase(fit: RefinementResult, phase: Phase) -> RefinedPhase:
    return RefinedPhase(
        crystal_system=phase.crystal_system.name,
        phase=phase.name,
        cell=Cell.from_array(fit.cell),
        su=Cell.from_array(fit.su),
        free_parameters=phase.lattice.free_parameters,
        rwp=fit.pattern_fit.rwp,
        reduced_chi2=fit.pattern_fit.reduced_chi2,
        parameters=dict(fit.parameters),
        parameters_su=dict(fit.parameters_su),
        explained=explained_fraction(fit.pattern_fit),
        intensities=fit.intensities,
        converged=fit.converged,
    )


def load_model(uri: str | None, tracking: Tracking) -> tuple[Predictor, registry.ModelVersion]:
    """Load a registered model.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None for the champion of the only
        registered model.
    tracking
        The MLflow database or server where it is registered.

    Raises
    ------
    ModelError
        If there is no such model, none is named and there is not exactly one, or it must not be
        loaded.
    """
    version = registry.find(tracking, uri or registry.champion_uri(tracking))
    return load_version(tracking.uri, version), version


def find_profiles(paths: Sequence[Path]) -> list[Path]:
    """Return the files that are named, and the profiles in the folders that are named.

    Raises
    ------
    PredictError
        If a folder holds no profile.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        profiles = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in PROFILE_SUFFIXES and file.is_file()
        )
        if not profiles:
            raise PredictError(
                f"The folder {path} holds no profile ({', '.join(PROFILE_SUFFIXES)}). Name files."
            )
        files += profiles
    return files


def read_measurements(path: Path, campaign: Campaign, options: ProfileOptions) -> list[Measurement]:
    """Read the profiles of a file and bring them to a campaign's grid, ready for predictions.

    Parameters and errors are those of :func:`bragg_data.measurement.load.load_measurements`; every
    message names the file.
    """
    return load_measurements(path, campaign, options.instrument, options.bank, options.two_theta)


def predict_measurements(
    measurements: Sequence[Measurement],
    model: Predictor,
    uri: str,
    library: PatternLibrary | None = None,
    *,
    progress: bool = False,
) -> list[PredictedProfile]:
    """Predict phase and cell of measured profiles, and find their library matches.

    Parameters
    ----------
    measurements
        Profiles on the model's grid.
    model, uri
        The model and its address.
    library
        Stored patterns to compare them with, or None to leave that out.
    progress
        Show a progress bar of the library match.

    Raises
    ------
    PredictorError, PreprocessingError, LibraryError
        If there is no signal in one of the profiles, or hardly a point of it is covered.
    """
    prepared = np.stack([m.prepared for m in measurements])
    calibrated = [m.calibration is not None and not m.nominal for m in measurements]
    prediction = model.predict(prepared, calibrated=calibrated)
    matches = None
    if library is not None:
        covered = np.stack([m.gridded.covered for m in measurements])
        matches = match_library(library, prepared, covered, progress=progress)
    snapshot = model.provenance.data.tag
    return [
        PredictedProfile(m, prediction, row, model.campaign, uri, snapshot, matches)
        for row, m in enumerate(measurements)
    ]


@dataclass
class FilePredictions:
    """Predictions of files, and the files that have none.

    Attributes
    ----------
    profiles
        Predictions in the order of the files.
    failures
        Errors by file; each message names it.
    """

    profiles: list[PredictedProfile] = field(default_factory=list)
    failures: dict[Path, Exception] = field(default_factory=dict)


def predict_files(
    files: Sequence[Path],
    options: ProfileOptions,
    model: Predictor,
    uri: str,
    library: PatternLibrary | None = None,
    *,
    progress: bool = False,
) -> FilePredictions:
    """Predict all profiles of some files; a file that cannot be predicted is a failure by itself.

    Parameters
    ----------
    files, options
        The files, and how they are read.
    model, uri
        The model and its address.
    library
        Stored patterns to compare the profiles with, or None to leave that out.
    progress
        Show a progress bar of the library match.
    """
    predictions = FilePredictions()
    measurements: list[tuple[Path, list[Measurement]]] = []
    for file in files:
        try:
            measurements.append((file, read_measurements(file, model.campaign, options)))
        except FILE_ERRORS as error:
            predictions.failures[file] = error
    profiles = [measurement for _, of_file in measurements for measurement in of_file]
    if not profiles:
        return predictions
    try:
        predictions.profiles = predict_measurements(
            profiles, model, uri, library, progress=progress
        )
    except FILE_ERRORS:
        # One profile fails the batch: file by file the others get their predictions.
        for file, of_file in measurements:
            try:
                predictions.profiles += predict_measurements(of_file, model, uri, library)
            except FILE_ERRORS as error:
                predictions.failures[file] = PredictError(f"{file}: {error}")
    return predictions
