"""Signs that a profile, or its calibration, is not what it seems."""

from collections.abc import Iterator

import numpy as np

from bragg_data.instrument.diffractometer import Instrument
from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement import resampling
from bragg_data.measurement.load import has_significant_peaks
from bragg_data.measurement.readers import Profile, ProfileError

_MASKED = 0.05  # of the points without information, from which they are reported


def d_range(profile: Profile, calibration: Instrument | None) -> tuple[float, float] | None:
    """Return the d-spacings in Å of the first and last point; None where they are not known."""
    if profile.unit == "d":
        return float(profile.tof[0]), float(profile.tof[-1])
    if calibration is None:
        return None
    try:
        first, last = calibration.d_spacing_from_tof(profile.tof[[0, -1]])
    except InstrumentError:
        return None
    return float(first), float(last)


def tof_range(profile: Profile, calibration: Instrument | None) -> tuple[float, float] | None:
    """Return the first and last time of flight in µs; None where d cannot be converted."""
    if profile.unit == "d":
        if calibration is None:
            return None
        try:
            profile = resampling.in_time_of_flight(profile, calibration)
        except ProfileError:
            return None
    return float(profile.tof[0]), float(profile.tof[-1])


def profile_doubts(profile: Profile, calibration: Instrument | None) -> Iterator[str]:
    """Yield what is suspicious about a profile and the calibration chosen for it, in sentences."""
    bank = "The profile" if profile.bank is None else f"Bank {profile.bank}"
    y, sigma = profile.intensity, profile.sigma
    masked = float((sigma <= 0).mean())
    if masked > _MASKED:
        first, last = profile.tof[sigma > 0][[0, -1]]
        yield (
            f"{bank}: {100 * masked:.0f} % of its points hold no information (σ is 0); the others "
            f"are from {first:.5g} to {last:.5g}{' µs' if profile.unit == 'us' else ' Å'}."
        )
    if not has_significant_peaks(y, sigma):
        yield f"{bank} has no significant peaks: no narrow peak stands out of background and noise."
    if profile.maybe_edges and (size := resampling.half_bin(profile)) > resampling.HALF_BIN_OF_NOTE:
        yield (
            f"{bank}: its times were taken as bin centres. If they are lower edges, as GSAS-II "
            f"takes those of columns, all lengths are half a bin ({100 * size:.2g} %) off: "
            f"give --bin-edges."
        )
    if calibration is not None:
        yield from resampling.doubts_of_angle(profile, calibration)
        try:
            profile = resampling.in_time_of_flight(profile, calibration)
            yield from resampling.doubt_of_d_spacings(profile, calibration)
            calibration.d_spacing_from_tof(profile.tof)
        except (InstrumentError, ProfileError) as error:
            yield str(error)


def counts_at_maximum(profile: Profile) -> float:
    """Return the largest (y/σ)²: as many counts have the relative uncertainty of that point."""
    good = profile.sigma > 0
    ratio = np.maximum(profile.intensity[good], 0.0) / profile.sigma[good]
    return float(ratio.max(initial=0.0) ** 2)
