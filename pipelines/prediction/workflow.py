"""From measured files to predictions: read, resample to the model's grid, predict, refine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import softmax

from bragg_data.arrays import Array, Integers
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError, encloses_volume
from bragg_data.crystallography.structure import Phase, scaled_to_volume_per_atom
from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.measurement.readers import ProfileError
from bragg_data.preprocessing import PreprocessingError
from bragg_data.refinement.evidence import log_evidence
from bragg_data.refinement.free_intensities import refine_lattices
from bragg_data.refinement.joint_result import JointResult
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.refinement.time_limit import TimeLimitError, limited
from bragg_models.library.search import LibraryError, Matches
from bragg_models.predictors import Prediction, Predictor, PredictorError
from catalog import registry
from pipelines.cli.console import Progress
from pipelines.cli.options import ProfileOptions
from pipelines.prediction import acceptance
from pipelines.prediction.combined_result import CombinedBanks
from pipelines.prediction.decision import decide
from pipelines.prediction.files import PredictError
from pipelines.prediction.library import PatternLibrary, match_library, match_result, open_library
from pipelines.prediction.result import Cell, PredictionResult, RefinedPhase
from pipelines.refinement.result import JointPhase, JointRefinement

FILE_ERRORS = (  # errors that concern one file and leave the results of the others
    ProfileError,
    InstrumentError,
    PreprocessingError,
    LibraryError,
    PredictorError,
    PredictError,
)


class _ForeignError(RefinementError):
    """A profile without lines of anything that could be refined."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A registered or packaged model in memory; library and refiner are opened on first use."""

    predictor: Predictor
    version: registry.ModelVersion
    tracking_uri: str  # where the version is registered
    store: str | None = None  # address of the library; None for where the model was trained
    use_library: bool = True  # whether the stored patterns are compared with the profiles
    progress: bool = False  # whether progress bars are shown

    @property
    def has_store(self) -> bool:
        """Whether its stored patterns may be at hand; a package comes without them."""
        return self.store is not None or not self.version.packaged

    @cached_property
    def library(self) -> PatternLibrary | None:
        """The snapshot that the model was trained on, or None if it is not used or not there."""
        if not self.use_library:
            return None
        return open_library(self.predictor, self.store, progress=self.progress)

    @cached_property
    def refiner(self) -> Refiner:
        """The refiner of the model's campaign."""
        return Refiner(self.predictor.campaign)


@dataclass(frozen=True, eq=False)
class BanksOfSample:
    """What the banks of a profile's sample show together, and what that means for the profile."""

    combined: CombinedBanks
    fit: JointResult | None  # the joint refinement as arrays, if there is one
    decides: JointPhase | None  # the jointly refined phase whose cell is the profile's, if it is


@dataclass(frozen=True, eq=False)
class PredictedProfile:
    """A measured profile with its prediction, as arrays; :meth:`result` returns plain values."""

    measurement: Measurement
    prediction: Prediction  # of a batch, in which this profile is a row
    row: int
    campaign: Campaign
    model: str  # address of the version
    snapshot: str  # tag of the library
    matches: Matches | None = None  # of the batch
    refined: tuple[RefinementResult, ...] = ()  # that with the most evidence first
    notes: tuple[str, ...] = ()  # warnings in addition to those of the measurement
    together: BanksOfSample | None = None  # of a sample with other banks, when these are predicted
    mixture: JointRefinement | None = None  # of the sample, where it is no phase by itself
    is_foreign: bool = False  # whether it shows no lines of anything that could be refined
    of_sample: str | None = None  # name of a sample that has several files

    @property
    def sample(self) -> str:
        """The sample: that of its file, unless it has several."""
        return self.of_sample or self.measurement.profile.source

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the campaign."""
        return tuple(self.campaign.phases)

    @property
    def phase(self) -> Phase:
        """The phase that the model predicts."""
        return self.phases[int(self.prediction.phase[self.row])]

    @property
    def cell(self) -> Array:
        """The cell that the model predicts, shape (6,); NaN from one that classifies only."""
        return np.asarray(self.prediction.cells[self.row])

    def result(self) -> PredictionResult:
        """Return the decision about the profile as plain values."""
        return self._result

    @cached_property
    def _result(self) -> PredictionResult:
        measurement, matches, row = self.measurement, self.matches, self.row
        predicted = replace(
            result_from_prediction(self.prediction, row, self.campaign, self.model),
            file=measurement.profile.source,
            bank=measurement.profile.bank,
            warnings=(*measurement.warnings, *self.notes, *self.campaign.assumptions),
        )
        match = match_result(matches, row, self.phases, self.snapshot) if matches else None
        decided = decide(predicted, match, refined_phases(self.refined, self.campaign, measurement))
        fits = self._ranked(decided)
        decided = replace(
            decided,
            acceptance=acceptance.assess_acceptance(self.prediction, row, fits),
            mixture=self.mixture,
        )
        return decided if self.together is None else self._with_banks(decided, self.together)

    def _with_banks(self, decided: PredictionResult, together: BanksOfSample) -> PredictionResult:
        decided, phase = replace(decided, combined=together.combined), together.decides
        if phase is None or phase.cell is None:
            return decided
        code = next(k for k, p in enumerate(self.phases) if p.name == phase.name)
        return replace(
            decided,
            cell=phase.cell,
            interval_estimates=acceptance.joint_intervals(phase, code, self.campaign),
            cell_from="joint refinement",
        )

    def _ranked(self, decided: PredictionResult) -> list[RefinementResult]:
        """Return the refinements in the order of a decision."""
        odds = [decided.probabilities[phase.name] for phase in self.phases]
        return sorted(self.refined, key=lambda fit: -odds[fit.phase])

    @property
    def fit(self) -> RefinementResult | None:
        """The refinement of the decided phase, or of the most plausible one that is refined."""
        return next(iter(self._ranked(self.result())), None)


def result_from_prediction(
    prediction: Prediction, row: int, campaign: Campaign, model: str
) -> PredictionResult:
    """Return one row of a model's predictions as plain values.

    ``model`` is the address of its version.
    """
    phases = campaign.phases
    phase = phases[int(prediction.phase[row])]
    probabilities = zip(phases, prediction.probabilities[row], strict=True)
    predicted = PredictionResult(
        crystal_system=phase.crystal_system.name,
        phase=phase.name,
        probabilities={phase.name: float(value) for phase, value in probabilities},
        cell=Cell.from_array(prediction.cells[row]),
        model=model,
        interval_estimates=acceptance.estimate_intervals(prediction, row, campaign),
        acceptance=acceptance.assess_acceptance(prediction, row),
        warnings=campaign.assumptions,
    )
    return decide(predicted)


def refined_phases(
    fits: Sequence[RefinementResult], campaign: Campaign, measurement: Measurement
) -> list[RefinedPhase]:
    """Return the refinements of a measurement as plain values, with intervals and probabilities."""
    if not fits:
        return []
    calibrated = measurement.calibration is not None and not measurement.nominal
    drift = measurement.half_bin, 0.0 if calibrated else campaign.measurement_effects.difc
    support = zip(fits, softmax(log_evidence(fits)).tolist(), strict=True)
    return [_refined_phase(fit, campaign, drift, probability) for fit, probability in support]


def _refined_phase(
    fit: RefinementResult, campaign: Campaign, drift: tuple[float, float], probability: float
) -> RefinedPhase:
    phase = campaign.phases[fit.phase]
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
        probability=probability,
        interval_estimates=acceptance.refined_intervals(fit, campaign, *drift),
    )


def read_measurements(path: Path, campaign: Campaign, options: ProfileOptions) -> list[Measurement]:
    """Read the profiles of a file and bring them to a campaign's grid, ready for predictions.

    Errors are those of :func:`bragg_data.measurement.load.load_measurements`; all name the file.
    """
    chosen = options.instrument, options.bank, options.two_theta
    return load_measurements(path, campaign, *chosen, options.reading)


def predict_measurements(
    measurements: Sequence[Measurement], model: LoadedModel
) -> list[PredictedProfile]:
    """Predict phase and cell of profiles on the model's grid, and find their library matches.

    Raises `PredictorError`, `PreprocessingError` or `LibraryError` if there is no signal in one of
    the profiles, or hardly a point of it is covered.
    """
    predictor, library = model.predictor, model.library
    prepared = np.stack([m.prepared for m in measurements])
    calibrated = [m.calibration is not None and not m.nominal for m in measurements]
    prediction = predictor.predict(prepared, calibrated=calibrated)
    prediction = prediction.widened(np.array([m.half_bin for m in measurements]))
    matches = None
    if library is not None:
        covered = np.stack([m.gridded.covered for m in measurements])
        matches = match_library(library, prepared, covered, progress=model.progress)
    where = predictor.campaign, model.version.uri, predictor.provenance.data.tag
    return [
        PredictedProfile(measurement, prediction, row, *where, matches)
        for row, measurement in enumerate(measurements)
    ]


def predict_files(
    files: Sequence[Path], options: ProfileOptions, model: LoadedModel, *, refine: bool = False
) -> tuple[list[PredictedProfile], dict[Path, Exception]]:
    """Predict, and refine on request, all profiles of some files.

    A file that cannot be predicted is a failure by itself: predictions come in the order of the
    files, and errors, which name their file, by the files that have none.
    """
    failures: dict[Path, Exception] = {}
    read: list[tuple[Path, list[Measurement]]] = []
    for file in files:
        try:
            read.append((file, read_measurements(file, model.predictor.campaign, options)))
        except FILE_ERRORS as error:
            failures[file] = error
    profiles, not_predicted = predict_read(read, model, refine=refine)
    return profiles, failures | not_predicted


def measured_cells(
    files: Sequence[Path], options: ProfileOptions, model: LoadedModel
) -> tuple[Integers, Array]:
    """Return phase (n,) and cell (n, 6) that a model predicts of all profiles of some files.

    Raises the error of the first file that cannot be predicted.
    """
    profiles, failures = predict_files(files, options, model)
    for error in failures.values():
        raise error
    rows = [(p.prediction.phase[p.row], p.prediction.cells[p.row]) for p in profiles]
    return np.array([phase for phase, _ in rows]), np.array([cell for _, cell in rows])


def predict_read(
    read: Sequence[tuple[Path, list[Measurement]]], model: LoadedModel, *, refine: bool = False
) -> tuple[list[PredictedProfile], dict[Path, Exception]]:
    """As :func:`predict_files`, of the measurements of files that have been read."""
    failures: dict[Path, Exception] = {}
    profiles: list[PredictedProfile] = []
    try:
        if read:
            profiles = predict_measurements([m for _, of_file in read for m in of_file], model)
    except FILE_ERRORS:
        # One profile fails the batch: file by file the others get their predictions.
        for file, of_file in read:
            try:
                profiles += predict_measurements(of_file, model)
            except FILE_ERRORS as error:
                failures[file] = PredictError(f"{file}: {error}")
    if refine and profiles:
        profiles = refine_predictions(profiles, model.refiner, progress=model.progress)
    return profiles, failures


def refine_predictions(
    profiles: Sequence[PredictedProfile], refiner: Refiner, *, progress: bool = False
) -> list[PredictedProfile]:
    """Refine every prediction, from the model's cell and for each phase from the library's.

    Where no structure of the model explains the peaks, lattices are refined with free intensities,
    and replace the refined structures if one of them explains the peaks. A rejected profile that
    has lines of nothing that is known is not refined, which takes a second. Where no refinement is
    possible a warning of the prediction gives the reason.
    """
    refined = []
    with Progress("Refining", len(profiles), "profiles", quiet=not progress) as bar:
        for profile in profiles:
            try:
                with limited():
                    fits = tuple(_refine(profile, refiner))
                refined.append(replace(profile, refined=fits))
            except (RefinementError, CrystalError, TimeLimitError) as error:
                foreign, note = isinstance(error, _ForeignError), f"Not refined: {error}"
                refined.append(replace(profile, is_foreign=foreign, notes=(note,)))
            bar.advance()
    return refined


def _refine(profile: PredictedProfile, refiner: Refiner) -> list[RefinementResult]:
    measurement = profile.measurement
    starts = refinement_starts(profile)
    if not starts:
        raise RefinementError(
            "the model predicts no cell that encloses a volume, and there is no library match to "
            "start from. Open the library (--library), or use another model."
        )
    accepted = profile.prediction.accepted
    is_rejected = accepted is not None and not accepted[profile.row]
    if is_rejected and not refiner.known_lines.resemble(measurement.gridded, starts):
        raise _ForeignError(
            "the model rejects it, and its lines are neither where those of the model's structures "
            "are, whatever the atoms, nor those of the usual cans. To search for other structures, "
            "name them (--phases)."
        )
    fits = refiner.refine(measurement.gridded, starts, tzero=measurement.calibration is None)
    if acceptance.explains(fits[0]):
        return fits
    cells = [(fit.phase, fit.cell) for fit in fits]
    lattices = refine_lattices(profile.campaign, measurement.gridded, cells)
    return lattices if acceptance.explains(lattices[0]) else fits


def refinement_starts(profile: PredictedProfile) -> list[tuple[int, Array]]:
    """Return phase codes and cells, shape (6,), from which refinements of a profile start.

    The predicted cell, for the other phases the cell of their CIF with the same volume per atom,
    and the library's best cell of each phase. A predicted cell that encloses no volume is left out,
    so that it costs neither its own phase a better start, nor the others theirs.
    """
    starts: list[tuple[int, Array]] = []
    predicted, cell = profile.phase, profile.cell
    if encloses_volume(cell[None])[0]:
        starts = [
            (code, cell if p is predicted else scaled_to_volume_per_atom(p, predicted, cell))
            for code, p in enumerate(profile.phases)
        ]
    if profile.matches is not None:
        starts += profile.matches.starts(profile.row)
    return starts
