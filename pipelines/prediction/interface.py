"""The Python interface for notebooks: load a model, predict and refine a profile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from bragg_data.instrument.instprm import read_instruments
from bragg_data.measurement.load import Measurement, measurement_from_profile
from bragg_data.measurement.readers import profile_from_arrays
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Predictor
from catalog import DEFAULT_TRACKING_URI
from catalog.tracking import Tracking
from pipelines.cli.options import ProfileOptions
from pipelines.prediction import workflow
from pipelines.prediction.library import INDEX_DIRECTORY, PatternLibrary, open_library
from pipelines.prediction.refinement import refine_predictions
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import PredictedProfile, PredictError

ProfileInput = str | Path | Sequence[ArrayLike]
"""A file, or the arrays (tof in µs, intensity per µs) or (tof, intensity, sigma)."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A registered model in memory, with its library and its refiner, opened on first use.

    Attributes
    ----------
    predictor, uri
        The model and the address of its version.
    store
        Address of the library; None for where the model was trained.
    use_library
        Whether the stored patterns are compared with the profiles.
    """

    predictor: Predictor
    uri: str
    store: str | None = None
    use_library: bool = True

    @cached_property
    def library(self) -> PatternLibrary | None:
        """The snapshot that the model was trained on, or None if it is not used or not there."""
        return open_library(self.predictor, self.store) if self.use_library else None

    @cached_property
    def refiner(self) -> Refiner:
        """The refiner of the model's campaign."""
        return Refiner(self.predictor.campaign, cache=INDEX_DIRECTORY)


def load_model(
    uri: str | None = None,
    *,
    tracking: str | None = None,
    store: str | None = None,
    use_library: bool = True,
) -> LoadedModel:
    """Load a registered model once, for many predictions.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None for the only champion.
    tracking
        MLflow's tracking URI; by default that of the environment (``MLFLOW_TRACKING_URI``), or the
        database of the commands.
    store
        Address of the store for the library match, if it is not where the model was trained.
    use_library
        Whether the stored patterns are compared with the profiles.

    Raises
    ------
    ModelError
        If there is no such model, or it must not be loaded.
    """
    tracking = tracking or os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING_URI)
    predictor, version = workflow.load_model(uri, Tracking(tracking))
    return LoadedModel(predictor, version.uri, store, use_library)


def predict(
    profile: ProfileInput,
    model: LoadedModel | str | None = None,
    *,
    instrument: str | Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
) -> PredictionResult:
    """Predict crystal system and cell of one measured profile.

    Parameters
    ----------
    profile
        A file; or arrays ``(tof, intensity)`` or ``(tof, intensity, sigma)`` of shape (n,), tof in
        µs, intensity and its standard deviation per µs. Without sigma counts are assumed.
    model
        The model (:func:`load_model`), its address, or None for the only champion. By its address
        it is loaded at the first call and stays in memory until another one is named.
    instrument
        The measurement's own calibration, a GSAS-II ``.instprm``.
    bank
        Bank of the file.
    two_theta
        Scattering angle of the bank in degrees, if the file does not have it.

    Raises
    ------
    PredictError, ProfileError, InstrumentError, PreprocessingError
        If the profile cannot be read, has no significant peaks or does not fit the model's grid, or
        the file has several banks at the model's angle.
    """
    options = ProfileOptions(_path(instrument), bank, two_theta)
    return _predicted(profile, _loaded(model), options).result()


def refine(
    profile: ProfileInput,
    model: LoadedModel | str | None = None,
    *,
    instrument: str | Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
) -> PredictionResult:
    """Predict one measured profile, and refine each plausible phase against the whole pattern.

    Parameters and errors are those of :func:`predict`. Where no refinement is possible, a warning
    of the result gives the reason.
    """
    options = ProfileOptions(_path(instrument), bank, two_theta)
    loaded = _loaded(model)
    predicted = _predicted(profile, loaded, options)
    return refine_predictions([predicted], loaded.refiner)[0].result()


def _loaded(model: LoadedModel | str | None) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else _load_by_address(model)


_load_by_address = lru_cache(maxsize=1)(load_model)


def _path(instrument: str | Path | None) -> Path | None:
    return None if instrument is None else Path(instrument)


def _predicted(
    profile: ProfileInput, model: LoadedModel, options: ProfileOptions
) -> PredictedProfile:
    measurements = _measurements(profile, model, options)
    if len(measurements) > 1:
        banks = ", ".join(str(m.profile.bank) for m in measurements)
        raise PredictError(
            f"{profile} has several banks at the model's angle ({banks}). Choose one with bank=…."
        )
    return workflow.predict_measurements(measurements, model.predictor, model.uri, model.library)[0]


def _measurements(
    profile: ProfileInput, model: LoadedModel, options: ProfileOptions
) -> list[Measurement]:
    campaign = model.predictor.campaign
    if isinstance(profile, str | Path):
        return workflow.read_measurements(Path(profile), campaign, options)
    instruments = None if options.instrument is None else read_instruments(options.instrument)
    columns = [np.asarray(values, dtype=np.float64) for values in profile]
    if len(columns) not in (2, 3):
        raise PredictError(
            f"A profile is a file or the arrays (tof, intensity) or (tof, intensity, sigma); got "
            f"{len(columns)} arrays."
        )
    measured = profile_from_arrays(*columns, bank=options.bank, two_theta=options.two_theta)
    return [measurement_from_profile(measured, campaign, instruments)]
