"""The Python interface for notebooks: load a model, predict and refine a profile."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from bragg_data.instrument.instprm import read_instruments
from bragg_data.measurement.load import load_measurements, measurement_from_profile
from bragg_data.measurement.readers import AS_USUAL, Reading, profile_from_arrays
from catalog import DEFAULT_TRACKING_URI
from catalog.registry import ModelVersion
from catalog.tracking import Tracking, open_existing
from pipelines.prediction import workflow
from pipelines.prediction.files import PredictError
from pipelines.prediction.mixture import with_mixtures
from pipelines.prediction.result import PredictionResult
from pipelines.prediction.workflow import LoadedModel, PredictedProfile
from pipelines.registry.packages import version_that_predicts, versions_that_predict
from pipelines.registry.registration import load_version

# A file, or the arrays (tof in µs, intensity per µs) or (tof, intensity, sigma).
ProfileInput = str | Path | Sequence[ArrayLike]


def load_model(
    uri: str | None = None,
    *,
    tracking: str | None = None,
    store: str | None = None,
    use_library: bool | None = None,
    progress: bool = False,
) -> LoadedModel:
    """Load a registered or packaged model once, for many predictions.

    Where no model is named and none is registered, the packaged model is loaded, and a line on
    standard error states so. Raises `ModelError` or `PackageError` if there is no such model, or it
    must not be loaded.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``packaged:NAME``; None for the only
        champion.
    tracking
        MLflow's tracking URI; by default that of the environment (``MLFLOW_TRACKING_URI``), or the
        database of the commands.
    store
        Address of the store for the library match, if it is not where the model was trained.
    use_library
        Whether the stored patterns are compared with the profiles; by default where the model comes
        from a store: a packaged model needs ``store``.
    progress
        Whether progress bars are shown.
    """
    place, where = _place_of(tracking)
    version = version_that_predicts(place, uri)
    return _loaded_version(version, where, store, use_library, progress=progress)


def load_models(
    uri: str | None = None,
    *,
    tracking: str | None = None,
    store: str | None = None,
    use_library: bool | None = None,
    progress: bool = False,
) -> list[LoadedModel]:
    """Load the models of an address: one, or of several banks the champion for each.

    ``uri`` may be of several models, ``models:/X-bank*-measured@champion``; without it they are
    loaded where all registered models are those of banks of one instrument. The other parameters
    and errors are those of :func:`load_model`.
    """
    place, where = _place_of(tracking)
    return [
        _loaded_version(version, where, store, use_library, progress=progress)
        for version in versions_that_predict(place, uri)
    ]


def _place_of(tracking: str | None) -> tuple[Tracking | None, str]:
    """Return the database or server, if it is there, and its address."""
    address = tracking or os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING_URI)
    place = open_existing(address)  # looking for a model creates no database
    return place, address if place is None else place.uri


def _loaded_version(
    version: ModelVersion,
    where: str,
    store: str | None,
    use_library: bool | None,
    *,
    progress: bool,
) -> LoadedModel:
    if use_library is None:
        use_library = store is not None or not version.packaged
    predictor = load_version(where, version)
    return LoadedModel(predictor, version, where, store, use_library, progress)


def predict(
    profile: ProfileInput,
    model: LoadedModel | str | None = None,
    *,
    instrument: str | Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
    reading: Reading = AS_USUAL,
) -> PredictionResult:
    """Predict crystal system and cell of one measured profile.

    Raises `PredictError`, `ProfileError`, `InstrumentError` or `PreprocessingError` if the profile
    cannot be read, has no significant peaks or does not fit the model's grid, or the file has
    several banks at the model's angle.

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
        Scattering angle of the bank in degrees, if the file does not have it, or to choose a bank.
    reading
        Unit of the axis, bin edges or centres, and place of the bank, where a file leaves it open.
    """
    return _predicted(profile, _loaded(model), instrument, bank, two_theta, reading).result()


def refine(
    profile: ProfileInput,
    model: LoadedModel | str | None = None,
    *,
    instrument: str | Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
    reading: Reading = AS_USUAL,
) -> PredictionResult:
    """Predict one measured profile, and refine each plausible phase against the whole pattern.

    Parameters and errors are those of :func:`predict`. Where no refinement is possible, a warning
    of the result gives the reason; where no phase explains the profile by itself, ``mixture`` names
    those of the model that do together.
    """
    loaded = _loaded(model)
    predicted = _predicted(profile, loaded, instrument, bank, two_theta, reading)
    refined = workflow.refine_predictions([predicted], loaded.refiner)
    calibration = None if instrument is None else Path(instrument)
    return with_mixtures(refined, calibration)[0].result()


_load_by_address = lru_cache(maxsize=1)(load_model)


def _loaded(model: LoadedModel | str | None) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else _load_by_address(model)


def _predicted(
    profile: ProfileInput,
    model: LoadedModel,
    instrument: str | Path | None,
    bank: int | None,
    two_theta: float | None,
    reading: Reading,
) -> PredictedProfile:
    campaign = model.predictor.campaign
    calibration = None if instrument is None else Path(instrument)
    if isinstance(profile, str | Path):
        measurements = load_measurements(
            Path(profile), campaign, calibration, bank, two_theta, reading
        )
    else:
        columns = [np.asarray(values, dtype=np.float64) for values in profile]
        if len(columns) not in (2, 3):
            raise PredictError(
                f"A profile is a file or the arrays (tof, intensity) or (tof, intensity, sigma); "
                f"got {len(columns)} arrays."
            )
        instruments = None if calibration is None else read_instruments(calibration)
        measured = profile_from_arrays(*columns, bank=bank, two_theta=two_theta)
        measurements = [measurement_from_profile(measured, campaign, instruments)]
    if len(measurements) > 1:
        banks = ", ".join(str(m.profile.bank) for m in measurements)
        raise PredictError(
            f"{profile} has several banks at the model's angle ({banks}). Choose one with bank=…."
        )
    return workflow.predict_measurements(measurements, model)[0]
