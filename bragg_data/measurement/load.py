"""Measured files on a campaign's grid: bank, calibration, resampling, prepared profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter, uniform_filter1d

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
from bragg_data.preprocessing import PreprocessingError, background_subtracted, prepare_measured

ANGLE_TOLERANCE = 5.0  # degrees between the angles of two banks that count as the same

# Significant peaks: noise alone would be predicted as some cell, too.
_WIDTHS = (1, 3, 9)  # points over which the signal is averaged: peaks may be finely sampled
_NOISE_WINDOW = 401  # points over which the scatter of neighbours is estimated

# Of noise alone, in profiles of 2,800 points and 0.05 to 10,000 counts, the largest values are 5.2
# and 5.0; of measured profiles (NOMAD, GEM, POWGEN, iMATERIA, HIPPO, WISH, VULCAN, SEPD) the
# smallest are 16 and 14. Lower limits accept noise, higher ones refuse weak samples.
_ABOVE_NOISE = 6.5
_ABOVE_SCATTER = 8.0


@dataclass(frozen=True)
class Label:
    """Known phase (its code in the campaign) and cell (Å and degrees) of a measured sample."""

    phase: int
    cell: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """A profile on a campaign's grid, ready for predictions.

    Attributes
    ----------
    profile, gridded
        As read, and on the campaign's grid with its background.
    calibration
        Used for resampling; None if times were taken as those of the campaign's instrument.
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
        gridded = self.gridded
        try:
            prepared = prepare_measured(gridded.intensity, gridded.sigma, gridded.covered)
        except PreprocessingError as error:
            raise ProfileError(f"{self.profile.name}: {error}") from error
        object.__setattr__(self, "prepared", prepared)


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
    instruments
        Calibrations of the measurement, one of which is the bank's. None for the nominal difC of
        the profile's header, or its times of flight as they are, with a warning.

    Raises
    ------
    ProfileError, InstrumentError
        If the profile fits neither the grid nor a calibration, or has no significant peaks.
    """
    instrument, nominal = campaign.instrument, instruments is None
    if instruments is None:
        calibration = nominal_calibration(profile, instrument)
    else:
        calibration = match_bank(profile, instruments)
    gridded = resample_to_grid(profile, campaign.grid, instrument, calibration)
    window = campaign.grid.tof[[0, -1]]
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


def has_significant_peaks(intensity: NDArray[np.float64], sigma: NDArray[np.float64]) -> bool:
    """Return whether anything stands significantly above the background of a profile.

    Averaged over 1, 3 or 9 points, the highest value has to be 6.5 standard deviations above the
    background. The standard deviation is the given one or that of the scatter of neighbours,
    whichever is larger, as it may have been calculated from scaled counts. Where it is far too
    large, for the same reason, 8 times the spread of the lower half of the values is enough.

    Parameters
    ----------
    intensity, sigma : shape (n,)
        As measured, because resampling correlates the noise of neighbours; ``sigma`` is 0 where a
        point holds no information.
    """
    informative = sigma > 0
    signal = background_subtracted(intensity, sigma)[informative]
    deviation = sigma[informative]
    if len(signal) < 3:
        return False
    noise = np.maximum(deviation, _scatter(intensity[informative]))
    for width in _WIDTHS:
        mean = uniform_filter1d(signal / noise, width, mode="constant")
        if mean.max() * np.sqrt(width) > _ABOVE_NOISE:
            return True
        mean = uniform_filter1d(signal / deviation, width, mode="nearest")
        low, middle = np.quantile(mean, [0.1587, 0.5])  # a standard deviation of normal values
        spread = middle - low
        # Of few counts most are equal: their spread means nothing.
        if spread > 1e-6 and mean.max() - middle > _ABOVE_SCATTER * spread:
            return True
    return False


def _scatter(intensity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the local standard deviation from second differences, which peaks hardly change."""
    second = np.abs(np.convolve(intensity, [1.0, -2.0, 1.0], mode="valid"))
    # The median of |N(0, s)| is 0.6745 s, and a second difference has 6 times the variance.
    local = median_filter(second, size=min(_NOISE_WINDOW, len(second)), mode="reflect")
    return np.asarray(np.pad(local, 1, mode="edge") / (0.6745 * np.sqrt(6)))
