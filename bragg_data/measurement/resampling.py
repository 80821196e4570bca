"""Measured profiles and calibrations: bins, the bank's calibration, a campaign's grid, warnings."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.files import read_bounded
from bragg_data.instrument import fullprof
from bragg_data.instrument.diffractometer import ANGLE_TOLERANCE, Instrument, angles_apart
from bragg_data.instrument.instprm import MOST_BYTES, InstrumentError, TofGrid
from bragg_data.measurement.readers import Profile, ProfileError

_MINIMUM_COVERAGE = 0.2  # of the campaign's grid (and at least 200 points of it) by a profile
_EXACT = 3e-4  # of what a difC may be off by: one in 1e5
_AS_NEAR = 0.05  # of what difC and angle may be off by, within which the number of a bank decides
_COARSEST_STEP = 8.0  # grid steps between measured points, beyond which peaks fall between them
HALF_BIN_OF_NOTE = 2e-5  # relative; shifts below this are lost in a calibration's uncertainty

# d-spacings in Å that powder diffractometers of time of flight measure: 0.1 at backward
# angles to 65 at NOMAD's 15°.
_SHORTEST, _LONGEST = 0.05, 100.0


@dataclass(frozen=True, eq=False)
class GriddedProfile:
    """A measured profile on a campaign's grid; all arrays have shape (points,)."""

    intensity: Array  # per µs of the campaign's instrument; 0 where not covered
    sigma: Array  # its standard deviation; 0 where not covered
    covered: Mask  # where the measurement holds information

    @property
    def informative(self) -> Mask:
        """Points that a fit can use, shape (points,): covered, with a standard deviation."""
        return self.covered & (self.sigma > 0)


def measured_tof(tof: Array, instrument: Instrument, calibration: Instrument | None) -> Array:
    """Return where the measured axis has times of flight (µs) of a campaign's instrument.

    At the same d by the measurement's calibration; None takes its times as the instrument's.
    """
    if calibration is None:
        return tof
    return calibration.tof_from_d_spacing(instrument.d_spacing_from_tof(tof))


def in_time_of_flight(profile: Profile, calibration: Instrument) -> Profile:
    """Return a profile over d-spacing as one over time of flight, by a calibration.

    Intensities stay as they are: d and time of flight are nearly proportional. Raises a
    ProfileError if the calibration does not grow with d over the profile.
    """
    if profile.unit == "us":
        return profile
    tof = calibration.tof_from_d_spacing(profile.tof)
    if not (tof[0] > 0 and (np.diff(tof) > 0).all()):
        ends = profile.tof[[0, -1]]
        raise ProfileError(
            f"{profile.name} is over {ends[0]:.4g}–{ends[1]:.4g} Å, where the calibration (difC "
            f"{calibration.difc:g}, difA {calibration.difa:g}, difB {calibration.difb:g}) does not "
            f"grow with d. Check the instrument file and the unit (--x-unit)."
        )
    return replace(profile, tof=tof, unit="us")


def resample_to_grid(
    profile: Profile, grid: TofGrid, instrument: Instrument, calibration: Instrument | None
) -> GriddedProfile:
    """Bring a measured profile to the grid of a campaign.

    Each point T of the grid is a d-spacing of the campaign's instrument, which the measurement's
    calibration puts at T' on the measured axis. Where the measured points are finer than the grid,
    those within a step are averaged by their overlap with it; elsewhere a cubic through four points
    is taken. Points without information (``sigma`` 0) take no part. Raises a ProfileError if the
    profile covers too little of the grid, or the calibration does not grow with d.
    """
    try:
        target = measured_tof(grid.tof, instrument, calibration)
    except InstrumentError as error:
        raise ProfileError(f"{profile.name} cannot be brought to the grid: {error}") from error
    if calibration is not None and not (np.diff(target) > 0).all():
        raise ProfileError(
            f"{profile.name}: the calibration (difC {calibration.difc:g}, difA "
            f"{calibration.difa:g}, difB {calibration.difb:g}) does not grow with d over the "
            f"grid. Check the instrument file."
        )
    values, variance, covered = _resampled(profile, target)
    needed = min(grid.points, max(200, math.ceil(_MINIMUM_COVERAGE * grid.points)))
    if covered.sum() < needed:
        axis = calibration or instrument
        raise ProfileError(
            f"{profile.name} is outside the instrument's range: it has points over "
            f"{_range(profile.tof, axis)}, the model needs {_range(target, axis)}; "
            f"{covered.sum()} of {grid.points} grid points are covered and {needed} are needed. "
            f"Give another bank, or a model of this bank; if the file's axis is another one, name "
            f"it with --x-unit."
        )
    # A density per µs of the measured axis becomes one per µs of the campaign's.
    stretch = np.gradient(target) / np.gradient(grid.tof)
    return GriddedProfile(
        intensity=np.where(covered, values * stretch, 0.0),
        sigma=np.where(covered, np.sqrt(variance) * stretch, 0.0),
        covered=covered,
    )


def _range(tof: Array, calibration: Instrument) -> str:
    ends = tof[[0, -1]]
    text = f"{ends[0]:.0f}–{ends[1]:.0f} µs"
    try:
        d = calibration.d_spacing_from_tof(ends)
    except InstrumentError:
        return text
    return f"{text} ({d[0]:.3f}–{d[1]:.3f} Å)"


def midpoints(x: Array) -> Array:
    """Return the edges (n + 1,) of bins about ascending centres (n,)."""
    inner = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - inner[0]], inner, [2 * x[-1] - inner[-1]]])


def _resampled(profile: Profile, target: Array) -> tuple[Array, Array, Mask]:
    """Return value, variance and coverage of the profile at ascending times."""
    tof, good = profile.tof, profile.sigma > 0
    y, variance = np.where(good, profile.intensity, 0.0), profile.sigma**2
    # Average over each target bin, by running sums at the edges of the measured bins.
    edges, bins = midpoints(tof), midpoints(target)
    width = np.diff(edges)

    def within(density: Array) -> Array:
        total = np.concatenate([[0.0], np.cumsum(density * width)])
        return np.diff(np.interp(bins, edges, total))

    share = within(good.astype(np.float64))
    step = np.diff(bins)
    enough = share > 0.5 * step
    safe = np.where(enough, share, 1.0)
    mean, mean_variance = within(y) / safe, within(variance * width) / safe**2
    # Cubic through four neighbours, or a line where one of the outer two is missing.
    left = np.clip(np.searchsorted(tof, target, side="right") - 1, 0, len(tof) - 2)
    inside = (target >= tof[0]) & (target <= tof[-1]) & good[left] & good[left + 1]
    fraction = np.clip((target - tof[left]) / (tof[left + 1] - tof[left]), 0.0, 1.0)
    nodes = np.clip(left[:, None] + np.arange(-1, 3), 0, len(tof) - 1)
    x = tof[nodes]
    whole = (np.diff(nodes, axis=1) == 1).all(axis=1) & good[nodes].all(axis=1)
    # Very unequal spacings make a cubic swing.
    gaps = np.diff(x, axis=1)
    whole &= gaps.max(axis=1) < 2 * np.maximum(gaps.min(axis=1), 1e-300)
    weights = np.zeros_like(x)
    weights[:, 1], weights[:, 2] = 1 - fraction, fraction
    for k in range(4):
        rest = [i for i in range(4) if i != k]
        top = np.prod(target[:, None] - x[:, rest], axis=1)
        bottom = np.prod(x[:, [k]] - x[:, rest], axis=1)
        weights[whole, k] = top[whole] / bottom[whole]
    value = (weights * y[nodes]).sum(axis=1)
    value_variance = (weights**2 * variance[nodes]).sum(axis=1)
    spacing = tof[left + 1] - tof[left]
    fine = spacing < 0.75 * step
    covered = np.where(fine, enough, inside & (spacing < _COARSEST_STEP * step))
    return (np.where(fine, mean, value), np.where(fine, mean_variance, value_variance), covered)


def match_bank(profile: Profile, instruments: Sequence[Instrument]) -> Instrument:
    """Choose the bank of an instrument file that a profile was measured on.

    The header decides: the bank whose difC lies within 3 % of the header's, or, if it names none,
    whose angle lies within 2° of the header's 2θ, on the same side of the beam if there is one; of
    several the nearest; of those that are as near, as the frames of one angle, that of the
    profile's number. An angle that difC and the flight path contradict decides nothing. (Bank
    numbers of data and instrument files need not agree, nor be unique.) A header with neither
    leaves the number, and a file of one bank needs none. Raises a ProfileError if no bank fits, or
    several do, naming the known ones.
    """
    doubtful = [_angle_is_doubtful(i, instruments) for i in instruments]
    known = "; ".join(
        f"{i.bank} (2θ {i.two_theta:g}°{' in doubt' if doubt else ''}, difC {i.difc:g})"
        for i, doubt in zip(instruments, doubtful, strict=True)
    )
    angle = profile.two_theta
    other_side = [False] * len(instruments)
    if profile.difc is not None:
        measured = f"difC {profile.difc:g}"
        distance = [abs(i.difc / profile.difc - 1) / 0.03 for i in instruments]
    elif angle is not None:
        measured = f"2θ {angle:g}°"
        distance = [
            math.inf if doubt else angles_apart(i.two_theta, angle) / 2.0
            for i, doubt in zip(instruments, doubtful, strict=True)
        ]
        other_side = [i.two_theta * angle < 0 for i in instruments]
    elif len(instruments) == 1:
        return instruments[0]
    else:
        same = [i for i in instruments if i.bank == profile.bank]
        if len(same) == 1:
            return same[0]
        raise ProfileError(
            f"{profile.name} does not say at which angle it was measured. Give the angle "
            f"(--two-theta); the instrument file holds the banks {known}."
        )
    order = [(d > 1, side, d) for d, side in zip(distance, other_side, strict=True)]
    nearest = order.index(min(order))
    if distance[nearest] > 1:
        raise ProfileError(
            f"{profile.name} was measured at {measured}, which no bank of the instrument file has. "
            f"Give the file of this instrument, or the angle (--two-theta) of one of its banks: "
            f"{known}."
        )
    # The very difC of a bank is no chance.
    exact = profile.difc is not None and distance[nearest] < _EXACT
    near = [
        instrument
        for instrument, (_, side, far) in zip(instruments, order, strict=True)
        if side == order[nearest][1] and far < distance[nearest] + (_EXACT if exact else _AS_NEAR)
    ]
    numbered = [instrument for instrument in near if instrument.bank == profile.bank]
    return numbered[0] if len(numbered) == 1 else instruments[nearest]


def _angle_is_doubtful(instrument: Instrument, instruments: Sequence[Instrument]) -> bool:
    """Whether a bank of a file contradicts itself, and no other bank confirms its angle.

    Where difC and 2θ of two banks give the same flight path, it is the file's that is wrong.
    """
    paths = [i.flight_path_of_difc / instrument.flight_path_of_difc for i in instruments]
    return bool(instrument.geometry_doubt) and sum(0.85 < p < 1.15 for p in paths) == 1 < len(paths)


def nominal_calibration(profile: Profile, instrument: Instrument) -> Instrument | None:
    """Return the calibration that the header alone gives: its difC, without difA, difB and Zero.

    Off by 0.1 to 0.4 % in every length, but better than another's. None if the header has no difC.
    """
    if profile.difc is None:
        return None
    angle = profile.two_theta or instrument.two_theta
    return instrument.with_parameters(
        two_theta=angle, difc=profile.difc, difa=0.0, difb=0.0, tzero=0.0, flight_path=0.0
    )


def measurement_warnings(
    profile: Profile,
    gridded: GriddedProfile,
    instrument: Instrument,
    calibration: Instrument | None,
    *,
    nominal: bool = False,
) -> list[str]:
    """Return what a user has to know before trusting a prediction for this profile, in sentences.

    The profile is given as read and on the grid of the campaign with this instrument; ``nominal``
    is whether the calibration that was used is the header's (:func:`nominal_calibration`).
    """
    warnings = list(profile.warnings)
    angle = profile.two_theta
    if profile.unit == "d":
        warnings.append(
            "The file is over d-spacing (or Q): its calibration is that of the data reduction, and "
            "an error of it is the same relative error of every length."
        )
    elif calibration is None:
        warnings.append(
            f"No calibration was given: times of flight were taken as those of the model's "
            f"instrument (difC {instrument.difc:g}). An error of difC is the same relative error "
            f"of every length; between the calibrations of one bank 0.1 to 0.4 % is usual, that is "
            f"0.004 to 0.016 Å in 4 Å. Give the measurement's own .instprm file."
        )
        if profile.difc is not None and abs(profile.difc / instrument.difc - 1) > 0.005:
            warnings.append(
                f"The header's nominal difC {profile.difc:g} differs from the model's "
                f"{instrument.difc:g} by {100 * (profile.difc / instrument.difc - 1):+.1f} %, and "
                f"so will every length."
            )
    elif nominal:
        warnings.append(
            f"No calibration was given: the header's nominal difC {calibration.difc:g} was used, "
            f"which is 0.1 to 0.4 % from a refined one, and so is every length (0.004 to 0.016 Å "
            f"in 4 Å). Give the measurement's own .instprm file."
        )
    elif angle is None and profile.difc is None and profile.bank is not None:
        warnings.append(
            f"The file does not say at which angle its bank {profile.bank} stands: it was taken to "
            f"be bank {calibration.bank} (2θ {calibration.two_theta:g}°) of the instrument file. "
            f"Numbers in data and instrument files need not agree: check, or give --two-theta."
        )
    if calibration is not None:
        warnings += [] if nominal else [f"Instrument file, {w}" for w in calibration.warnings]
        warnings += doubts_of_angle(profile, calibration)
        if abs(calibration.difc / instrument.difc - 1) > 0.05:
            warnings.append(
                f"The measurement's difC {calibration.difc:g} and the model's {instrument.difc:g} "
                f"differ by more than 5 %: another bank or instrument has other peak widths."
            )
        angle = angle if calibration.geometry_doubt else calibration.two_theta
    if angle is not None and angles_apart(angle, instrument.two_theta) > ANGLE_TOLERANCE:
        warnings.append(
            f"The profile was measured at 2θ {angle:g}° and the model's instrument stands at "
            f"{instrument.two_theta:g}°."
        )
    size = half_bin(profile)
    if profile.maybe_edges and not nominal and calibration and size > HALF_BIN_OF_NOTE:
        warnings.append(
            f"The file does not show whether its times are bin edges or centres: they were taken "
            f"as centres. GSAS-II takes them for lower edges, that is half a bin "
            f"({100 * size:.2g} % of every length) later: if the calibration was refined there "
            f"on such files, give --bin-edges; if these are centres, --bin-centres. Until then "
            f"predicted intervals of lengths hold for both; the standard uncertainties of a "
            f"refined cell do not."
        )
    share = 100 * float(gridded.covered.mean())
    if share < 99:
        warnings.append(f"The profile covers {share:.0f} % of the model's times of flight.")
    return warnings


def doubts_of_angle(profile: Profile, calibration: Instrument) -> list[str]:
    """Return doubts about the angle of a calibration, in itself or by the header, in sentences."""
    if calibration.geometry_doubt:
        return [calibration.geometry_doubt]
    angle = profile.two_theta
    if angle is None or angles_apart(angle, calibration.two_theta) <= ANGLE_TOLERANCE:
        return []
    return [
        f"{profile.name}: the header says 2θ {angle:g}° and the calibration is of a bank at "
        f"{calibration.two_theta:g}°: check that it is of this instrument."
    ]


def text_of_calibration(calibration: Path) -> str:
    """Return the text of an instrument file for what its kind implies, or an empty one.

    A ProfileError is raised for GSAS's and GSAS-II's files of constant wavelength, by their name.
    """
    try:
        text = read_bounded(calibration, MOST_BYTES).decode("latin-1")
    except OSError:
        return ""  # refused where it is read
    if match := re.search(r"^(?:INS\s+HTYPE\s+|Type:\s*)(P[NX]C\w*)", text, re.MULTILINE):
        raise ProfileError(
            f"{calibration} is an instrument of constant wavelength ({match[1]}); only time of "
            f"flight is supported."
        )
    return text


def half_bin(profile: Profile) -> float:
    """Return half a bin as a relative error of every length, where edges and centres are unclear.

    It is 0 where the file, its kind or the user decides.
    """
    if not (profile.maybe_edges or profile.maybe_centres):
        return 0.0
    return 0.5 * profile.relative_step


def with_bins_of_calibration(profile: Profile, calibration: str) -> Profile:
    """Return a profile of columns as one over centres where its calibration is FullProf's.

    FullProf takes times of columns for centres, and so does its calibration, by the text of the
    file. A GSAS-II file does not show whether it was refined on columns, which GSAS-II takes for
    lower edges, or comes from elsewhere: the times stay in doubt.
    """
    if profile.maybe_edges and profile.unit == "us" and fullprof.recognised(calibration):
        return replace(profile, maybe_edges=False)
    return profile


def doubt_of_d_spacings(profile: Profile, calibration: Instrument) -> list[str]:
    """Return a doubt of a profile over d-spacings that are hardly measured, in a sentence.

    Where most of its points are there, the axis or the calibration is another one than it seems: a
    ProfileError. Points without information do not count.
    """
    d = (profile.tof[profile.sigma > 0] - calibration.tzero) / calibration.difc
    outside = (d < _SHORTEST) | (d > _LONGEST)
    if not outside.any():
        return []
    where = (
        f"By the calibration (difC {calibration.difc:g}) the profile is over {d[0]:.3g}–{d[-1]:.3g}"
        f" Å, and powders are measured between {_SHORTEST:g} and {_LONGEST:g} Å: check the unit of "
        f"the axis (--x-unit), and that the calibration is of this bank."
    )
    if outside.mean() > 0.5:
        raise ProfileError(f"{profile.name}: {where}")
    return [where]
