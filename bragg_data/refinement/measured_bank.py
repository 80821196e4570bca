"""Measured banks as a refinement takes them: their own points, and patterns averaged over bins."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.polynomial import chebyshev
from scipy.interpolate import BSpline
from scipy.ndimage import spline_filter1d
from scipy.sparse import csr_array

from bragg_data.arrays import AnyFloats, Array, Mask
from bragg_data.instrument.band import Band, fwhm, spacings_of, where_peaks_are
from bragg_data.instrument.incident import IncidentSpectrum
from bragg_data.instrument.instprm import Instrument, TofGrid
from bragg_data.measurement.readers import Profile
from bragg_data.measurement.resampling import half_bin, in_time_of_flight, midpoints
from bragg_data.refinement.result import RefinementError

_PER_FWHM = 3.2  # points of the calculated grid; a spline through them is good to 1e-3 of a peak
_PER_BIN = 0.5  # steps of the calculated grid over the measured bins, at least
_MOST_POINTS = 14_000
_BEYOND = 0.03  # of the times, by which the grid is longer than the measurement: tails reach in
_FEWEST = 60  # points
_SHORTEST = 0.05  # Å
_NARROWEST = 0.25  # width over the usual one, below which the constants are not to be trusted
_REACH = 3  # a quintic B-spline, in steps of the grid to either side


@dataclass(frozen=True, eq=False)
class MeasuredBank:
    """The points of a profile that are refined, and where its patterns are calculated."""

    profile: Profile  # over time of flight
    instrument: Instrument  # the calibration of the measurement
    tof: Array  # (n,) µs; centres of bins
    intensity: Array  # (n,)
    sigma: Array  # (n,)
    edges: Array  # (n, 2) of the bins, µs
    grid: TofGrid  # on which patterns are simulated
    half_bin: float  # relative, where edges and centres are unclear; else 0

    @property
    def name(self) -> str:
        """The file, and the bank in it."""
        return self.profile.name

    @property
    def number(self) -> int:
        """The number of the bank in its file, or that of the calibration."""
        number = self.profile.bank
        return int(self.instrument.bank if number is None else number)

    @property
    def label(self) -> str:
        """A short name."""
        return f"bank {self.number}"

    @property
    def sin_theta(self) -> float:
        """Sine of half the scattering angle."""
        return float(abs(np.sin(np.radians(self.instrument.two_theta / 2))))

    @property
    def d(self) -> Array:
        """The d-spacing of each point in Å."""
        return self.instrument.d_spacing_from_tof(self.tof)

    @cached_property
    def _averages(self) -> csr_array:
        """Means of quintic B-splines (columns: nodes of the grid) over the bins (rows)."""
        spline = BSpline.basis_element(np.arange(-_REACH, _REACH + 1), extrapolate=False)
        integral = spline.antiderivative()
        u = np.log(self.edges / self.grid.start) / self.grid.relative_step
        first = np.floor(u[:, 0]).astype(int) - _REACH + 1
        count = int((np.ceil(u[:, 1]) - np.floor(u[:, 0])).max()) + 2 * _REACH - 1
        nodes = first[:, None] + np.arange(count)

        def below(x: Array) -> Array:
            return np.where(x >= _REACH, 1.0, np.nan_to_num(integral(np.clip(x, -_REACH, _REACH))))

        share = below(u[:, 1:] - nodes) - below(u[:, :1] - nodes)
        share /= np.diff(u, axis=1)
        rows = np.repeat(np.arange(len(u)), count)
        inside = ((nodes >= 0) & (nodes < self.grid.points)).ravel()
        values = (share.ravel()[inside], (rows[inside], nodes.ravel()[inside]))
        return csr_array(values, shape=(len(u), self.grid.points))

    def at_points(self, patterns: AnyFloats) -> Array:
        """Return patterns (m, points of the grid) averaged over the measured bins, (n, m)."""
        coefficients = spline_filter1d(patterns, order=5, axis=1, output=np.float64, mode="mirror")
        return np.asarray(self._averages @ coefficients.T)

    def polynomials(self, terms: int) -> Array:
        """Return Chebyshev polynomials (n, terms) over the logarithm of the time of flight."""
        x = np.log(self.tof / self.tof[0]) / np.log(self.tof[-1] / self.tof[0])
        return np.asarray(chebyshev.chebvander(2 * x - 1, terms - 1))

    @cached_property
    def full_width(self) -> Array:
        """Full width at half maximum in µs of the instrument's peak at each point."""
        d = np.geomspace(float(self.d[0]), float(self.d[-1]), 40)
        widths = fwhm(self.instrument, d)
        return np.interp(self.d, d, widths)


def measured_bank(
    profile: Profile,
    instrument: Instrument,
    *,
    window: tuple[float, float] | None = None,
    incident: IncidentSpectrum | None = None,
    d_range: tuple[float, float] = (0.0, np.inf),
) -> MeasuredBank:
    """Return the points of a profile that can be refined, and a grid for their patterns.

    Those with a standard deviation, within a window of times in µs and a range of d-spacings in Å,
    where the instrument's constants give peaks a width. Intensities are divided by an incident
    spectrum. A RefinementError is raised if there are too few.
    """
    size = half_bin(profile)
    profile = in_time_of_flight(profile, instrument)
    tof, sigma = profile.tof, profile.sigma
    good = np.isfinite(profile.intensity) & (sigma > 0) & (tof > 0)
    if window is not None:
        good &= (tof >= window[0]) & (tof <= window[1])
    spectrum = np.ones(len(tof))
    if incident is not None and good.any():
        spectrum = incident(tof)
        good &= np.isfinite(spectrum) & (spectrum > 0)
        spectrum = np.where(good, spectrum / np.median(spectrum[good]), 1.0)
    _refuse_few(profile, good, "with information")
    ends = tof[good][[0, -1]] * np.array([1 - _BEYOND, 1 + _BEYOND])
    shortest, longest = spacings_of(instrument, *ends.tolist())
    limits = max(shortest, d_range[0] * (1 - _BEYOND)), min(longest, d_range[1] * (1 + _BEYOND))
    band = where_peaks_are(Band(instrument, max(limits[0], _SHORTEST), limits[1], ""))
    if band is None:
        raise RefinementError(
            f"{profile.name}: the calibration of bank {instrument.bank} gives peaks no width "
            f"between {limits[0]:.3g} and {limits[1]:.3g} Å. Check that it is of this instrument."
        )
    band, width = _where_widths_are_likely(band)
    first, last = instrument.tof_from_d_spacing(np.array([band.shortest, band.longest]))
    step = max(
        float(width.min()) / _PER_FWHM,
        _PER_BIN * profile.relative_step,  # finer details are averaged away
        float(np.log(last / first)) / _MOST_POINTS,
    )
    grid = TofGrid(float(first), step, int(np.log(last / first) / step) + 1)
    # Peaks just outside of the points reach in with their tails: the grid is longer than they are.
    good &= (tof > first * (1 + 0.5 * _BEYOND)) & (tof < grid.stop * (1 - 0.5 * _BEYOND))
    _refuse_few(profile, good, "where its calibration gives peaks a width")
    edges = midpoints(tof)
    return MeasuredBank(
        profile=profile,
        instrument=instrument,
        tof=tof[good],
        intensity=(profile.intensity / spectrum)[good],
        sigma=(sigma / spectrum)[good],
        edges=np.stack([edges[:-1], edges[1:]], axis=1)[good],
        grid=grid,
        half_bin=size,
    )


def _where_widths_are_likely(band: Band) -> tuple[Band, Array]:
    """Return the longest part of a band without extremely narrow peaks, and relative widths there.

    Where polynomials for the widths are used beyond the range that they were fitted in, they fall
    to zero before they are negative.
    """
    d = np.geomspace(band.shortest, band.longest, 200)
    width = band.relative_width(d)
    likely = np.concatenate([[False], width > _NARROWEST * np.median(width), [False]])
    runs = np.flatnonzero(np.diff(likely.astype(int))).reshape(-1, 2)
    first, last = runs[np.argmax(runs[:, 1] - runs[:, 0])]
    return replace(band, shortest=d[first], longest=d[last - 1]), width[first:last]


def _refuse_few(profile: Profile, good: Mask, which: str) -> None:
    if good.sum() < _FEWEST:
        raise RefinementError(
            f"{profile.name} has {good.sum()} points {which}, too few to refine ({_FEWEST})."
        )
