"""Pseudo-experiments: simulated profiles with noise and all that differs, and their truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bragg_data.campaign import Campaign
from bragg_data.measurement.label import Label
from bragg_data.measurement.load import Measurement
from bragg_data.measurement.readers import Profile, ProfileError
from bragg_data.measurement.resampling import measurement_warnings, resample_to_grid


@dataclass(frozen=True, eq=False)
class PseudoExperiment:
    """One pseudo-experiment.

    Attributes
    ----------
    measurement
        On the campaign's grid.
    label
        Its phase and cell.
    truth
        The JSON object: displacement and broadening parameters, difC, Zero …
    """

    measurement: Measurement
    label: Label
    truth: dict[str, Any]


def read_pseudo_experiments(
    path: Path, campaign: Campaign, *, calibrated: bool
) -> list[PseudoExperiment]:
    """Read pseudo-experiments: an NPZ file with ``tof``, ``y``, ``sigma``, and a JSON file beside.

    Parameters
    ----------
    path
        The NPZ file; the truth is in the file of the same name that ends with .json.
    campaign
        Whose grid, instrument and phases (one for each crystal system).
    calibrated
        Whether each profile's own difC and Zero are used, as a calibrated instrument has them;
        otherwise its times are taken as those of the campaign's instrument.

    Raises
    ------
    ProfileError
        If the files are not there, or hold something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            tof, intensity, sigma = (np.asarray(file[k], dtype=np.float64)
                                     for k in ("tof", "y", "sigma"))  # fmt: skip
        truths = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = [
            _pseudo(f"{path}#{k}", tof, y, s, truth, campaign, calibrated)
            for k, (y, s, truth) in enumerate(zip(intensity, sigma, truths, strict=True))
        ]
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(
            f"{path} holds no pseudo-experiments with their truth beside it ({error}). An NPZ file "
            f"with tof (n,), y and sigma (m, n) is wanted, and a JSON file of the same name."
        ) from error
    return found


def _pseudo(
    name: str,
    tof: np.ndarray,
    intensity: np.ndarray,
    sigma: np.ndarray,
    truth: dict[str, Any],
    campaign: Campaign,
    calibrated: bool,
) -> PseudoExperiment:
    profile = Profile(
        tof, intensity, sigma, bank=None, title=f"pseudo-experiment {truth['index']}",
        two_theta=None, difc=None, header={}, source=name,
    )  # fmt: skip
    instrument = campaign.instrument
    own = (
        instrument.with_parameters(difc=truth["difC"], tzero=truth["Zero"]) if calibrated else None
    )
    gridded = resample_to_grid(profile, campaign.grid, instrument, own)
    said = measurement_warnings(profile, gridded, instrument, own)
    (phase,) = (
        code for code, one in enumerate(campaign.phases)
        if one.crystal_system.name == truth["crystal_system"]
    )  # fmt: skip
    lattice = campaign.phases[phase].lattice
    free = np.array([[truth[parameter] for parameter in lattice.free_parameters]])
    return PseudoExperiment(
        Measurement(profile, gridded, own, own is None, said),
        Label(phase, tuple(float(v) for v in lattice.cells(free)[0])),
        truth,
    )
