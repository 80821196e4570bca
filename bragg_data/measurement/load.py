"""From a measured file to a campaign's grid: bank, calibration, resampling, prepared profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.instrument.instprm import Instrument, read_instruments
from bragg_data.measurement.readers import Profile, ProfileError, read_profiles
from bragg_data.measurement.resampling import (
    GriddedProfile,
    match_bank,
    measurement_warnings,
    nominal_calibration,
    resample_to_grid,
)
from bragg_data.measurement.significance import has_significant_peaks
from bragg_data.preprocessing import PreprocessingError, prepare_measured

ANGLE_TOLERANCE = 5.0
"""Degrees between the angles of two banks that count as the same."""


@dataclass(frozen=True)
class Measurement:
    """A profile on a campaign's grid, ready for predictions.

    Attributes
    ----------
    profile
        As read.
    gridded
        On the campaign's grid, with its background.
    calibration
        Calibration with which it was resampled; None if its times were taken as those of the
        campaign's instrument.
    nominal
        Whether that is the header's, or none.
    warnings
        What a user has to know, in sentences.
    prepared : shape (points,)
        Background subtracted, between 0 and 1: the view ``measured_aligned``.

    Raises
    ------
    ProfileError
        If nothing stands above the background.
    """

    profile: Profile
    gridded: GriddedProfile
    calibration: Instrument | None
    nominal: bool
    warnings: list[str]
    prepared: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the profile, so that one that cannot be is refused where it is read."""
        gridded = self.gridded
        try:
            prepared = prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
        except PreprocessingError as error:
            raise ProfileError(f"{self.profile.name}: {error}") from error
        object.__setattr__(self, "prepared", prepared)


def calibrated_measurement(
    profile: Profile, campaign: Campaign, calibration: Instrument | None, *, nominal: bool = False
) -> Measurement:
    """Bring a profile to a campaign's grid, with a given calibration.

    Parameters
    ----------
    profile
        As read.
    campaign
        Grid and instrument.
    calibration
        The measurement's calibration; None takes its times as those of the campaign's instrument.
    nominal
        Whether the calibration is the header's.

    Raises
    ------
    ProfileError
        If the profile covers too little of the grid or has no significant peaks there, or if the
        calibration does not grow with d.
    """
    instrument, grid = campaign.instrument, campaign.grid
    gridded = resample_to_grid(profile, grid, instrument, calibration)
    window = grid.tof[[0, -1]]
    if calibration is not None:
        window = calibration.tof_from_d_spacing(instrument.d_spacing_from_tof(window))
    inside = (profile.tof >= window[0]) & (profile.tof <= window[1])
    if not has_significant_peaks(profile.intensity[inside], profile.sigma[inside]):
        raise ProfileError(
            f"{profile.name} has no significant peaks between {window[0]:.0f} and {window[1]:.0f} "
            f"µs: nothing stands out of the noise of its background, so there is nothing to "
            f"determine a cell from. Check the file and its bank, or measure longer."
        )
    warnings = measurement_warnings(profile, gridded, instrument, calibration, nominal=nominal)
    return Measurement(profile, gridded, calibration, nominal or calibration is None, warnings)


def load_measurements(
    path: Path,
    campaign: Campaign,
    calibration: Path | None = None,
    bank: int | None = None,
    two_theta: float | None = None,
) -> list[Measurement]:
    """Read the profiles of a file and bring them to a campaign's grid.

    Parameters
    ----------
    path
        The file.
    campaign
        Grid and instrument.
    calibration
        The measurement's ``.instprm`` file. Without it the header's nominal difC is used, or the
        times of flight as they are, with a warning.
    bank
        Only this bank of the file; by default those at the angle of the model's instrument.
    two_theta
        Scattering angle in degrees, instead of what the file says or does not say.

    Raises
    ------
    ProfileError, InstrumentError
        If the file cannot be read, fits neither the grid nor the calibration, has no significant
        peaks, or an angle is given for more than one bank.
    """
    instruments = None if calibration is None else read_instruments(calibration)
    profiles = read_profiles(path, bank)
    if bank is None and len(profiles) > 1:
        profiles = _at_the_models_angle(profiles, campaign.instrument)
    if two_theta is not None:
        if len(profiles) > 1:
            raise ProfileError(
                f"{path} has {len(profiles)} banks that could be meant, and --two-theta is the "
                f"angle of one: name it with --bank."
            )
        # The header's nominal difC would decide otherwise, where it is of use for nothing else.
        difc = profiles[0].difc if instruments is None else None
        profiles = [replace(profiles[0], two_theta=two_theta, difc=difc)]
    return [measurement_from_profile(profile, campaign, instruments) for profile in profiles]


def measurement_from_profile(
    profile: Profile, campaign: Campaign, instruments: Sequence[Instrument] | None = None
) -> Measurement:
    """Bring a profile to a campaign's grid, with the calibration of its bank.

    Parameters
    ----------
    profile
        The measured profile.
    campaign
        Campaign of the grid and the instrument.
    instruments
        Calibrations of the measurement, one of which is the bank's. None for the nominal difC of
        the profile's header, or its times of flight as they are, with a warning.

    Raises
    ------
    ProfileError, InstrumentError
        If the profile fits neither the grid nor a calibration, or has no significant peaks.
    """
    if instruments is None:
        nominal = nominal_calibration(profile, campaign.instrument)
        return calibrated_measurement(profile, campaign, nominal, nominal=True)
    return calibrated_measurement(profile, campaign, match_bank(profile, instruments))


def _at_the_models_angle(profiles: list[Profile], instrument: Instrument) -> list[Profile]:
    known = ", ".join(
        f"{p.bank}" + ("" if p.two_theta is None else f" ({p.two_theta:g}°)") for p in profiles
    )
    chosen = [
        p
        for p in profiles
        if p.two_theta is not None and abs(p.two_theta - instrument.two_theta) < ANGLE_TOLERANCE
    ]
    if not chosen and all(p.two_theta is None for p in profiles):
        chosen = [p for p in profiles if p.bank == instrument.bank]
    if not chosen:
        raise ProfileError(
            f"{profiles[0].source} holds banks {known}, none at the angle of the model's "
            f"instrument ({instrument.two_theta:g}°). Name one with --bank, or take a model of "
            f"that bank."
        )
    return chosen
