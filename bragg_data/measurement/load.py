"""From a measured file to a campaign's grid: bank, calibration, alignment, and what to be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from bragg_data.preprocessing import prepare_measured

ANGLE_TOLERANCE = 5.0
"""Degrees between the angles of two banks that count as one."""


@dataclass(frozen=True)
class Measurement:
    """A profile on a campaign's grid, ready to be asked about.

    Attributes
    ----------
    profile
        As read.
    gridded
        On the campaign's grid, with its background.
    calibration
        What brought it there; None if its times were taken as those of the campaign's instrument.
    nominal
        Whether that is the header's, or none.
    warnings
        What a user has to know, in sentences.
    """

    profile: Profile
    gridded: GriddedProfile
    calibration: Instrument | None
    nominal: bool
    warnings: list[str]

    @cached_property
    def prepared(self) -> NDArray[np.float64]:
        """Background off, between 0 and 1: the view ``measured_aligned``, shape (points,)."""
        g = self.gridded
        return prepare_measured(g.intensity, g.sigma, g.covered)


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
        Whose grid and instrument.
    calibration
        The measurement's own ``.instprm``. Without it the header's nominal difC is used, or the
        times of flight as they are, with a warning.
    bank
        Only this bank of the file; by default those at the angle of the model's instrument.
    two_theta
        Scattering angle in degrees, instead of what the file says or does not say.

    Raises
    ------
    ProfileError, InstrumentError
        If the file cannot be read, fits neither the grid nor the calibration, or an angle is given
        for more than one bank.
    PreprocessingError
        If nothing stands above the background.
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
    """Bring a profile to a campaign's grid.

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
        If the profile fits neither the grid nor a calibration.
    """
    nominal = instruments is None
    calibration = (
        nominal_calibration(profile, campaign.instrument)
        if instruments is None
        else match_bank(profile, instruments)
    )
    gridded = resample_to_grid(profile, campaign.grid, campaign.instrument, calibration)
    warnings = measurement_warnings(
        profile, gridded, campaign.instrument, calibration, nominal=nominal
    )
    return Measurement(profile, gridded, calibration, nominal, warnings)


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
