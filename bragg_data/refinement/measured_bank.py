"""Measured banks as a refinement takes them: their own points, and patterns averaged over bins."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

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
        return _spacings(self.instrument, self.tof.tobytes())

    @cached_property
    def _averages(self) -> csr_array:
        return _means_over_bins(self.edges.tobytes(), self.grid)

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
        return np.interp(
            self.d, *_full_widths(self.instrument, float(self.d[0]), float(self.d[-1]))
        )


def with_wide_bins(bank: MeasuredBank, per_width: float = 4.0) -> MeasuredBank:
    """Return a bank with neighbouring bins joined, as far as some remain for each peak's width."""
    width = bank.full_width / np.diff(bank.edges, axis=1)[:, 0]
    count = int(width.min() / per_width)
    if count < 2:
        return bank
    # Groups of bins that touch each other.
    together = np.isclose(bank.edges[1:, 0], bank.edges[:-1, 1], rtol=1e-9, atol=0)
    begins = np.flatnonzero(~np.concatenate([[False], together]))
    since = (
        np.arange(len(bank.tof))
        - begins[np.searchsorted(begins, np.arange(len(bank.tof)), "right") - 1]
    )
    first = np.flatnonzero(since % count == 0)
    share = np.diff(bank.edges, axis=1)[:, 0]
    total = np.add.reduceat(share, first)
    edges = np.stack([bank.edges[first, 0], bank.edges[[*(first[1:] - 1), -1], 1]], axis=1)
    return replace(
        bank,
        tof=edges.mean(axis=1),
        intensity=np.add.reduceat(bank.intensity * share, first) / total,
        sigma=np.sqrt(np.add.reduceat((bank.sigma * share) ** 2, first)) / total,
        edges=edges,
    )


# Frames of a series have bins and calibrations alike.
@lru_cache(maxsize=256)
def _spacings(instrument: Instrument, tof: bytes) -> Array:
    """Return d-spacings (n,) in Å at times in µs."""
    d = instrument.d_spacing_from_tof(np.frombuffer(tof))
    d.flags.writeable = False
    return d


@lru_cache(maxsize=64)
def _means_over_bins(edges: bytes, grid: TofGrid) -> csr_array:
    """Return means of quintic B-splines (columns: nodes of the grid) over bins (rows)."""
    spline = BSpline.basis_element(np.arange(-_REACH, _REACH + 1), extrapolate=False)
    integral = spline.antiderivative()
    u = np.log(np.frombuffer(edges).reshape(-1, 2) / grid.start) / grid.relative_step
    first = np.floor(u[:, 0]).astype(int) - _REACH + 1
    count = int((np.ceil(u[:, 1]) - np.floor(u[:, 0])).max()) + 2 * _REACH - 1
    nodes = first[:, None] + np.arange(count)

    def below(x: Array) -> Array:
        return np.where(x >= _REACH, 1.0, np.nan_to_num(integral(np.clip(x, -_REACH, _REACH))))

    share = below(u[:, 1:] - nodes) - below(u[:, :1] - nodes)
    share /= np.diff(u, axis=1)
    rows = np.repeat(np.arange(len(u)), count)
    inside = ((nodes >= 0) & (nodes < grid.points)).ravel()
    values = (share.ravel()[inside], (rows[inside], nodes.ravel()[inside]))
    return csr_array(values, shape=(len(u), grid.points))


@lru_cache(maxsize=256)
def _full_widths(instrument: Instrument, first: float, last: float) -> tuple[Array, Array]:
    """Return d-spacings (40,) in Å between two, and full widths there in µs."""
    d = np.geomspace(first, last, 40)
    return d, fwhm(instrument, d)


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
    likely = _where_widths_are_likely(instrument, max(limits[0], _SHORTEST), limits[1])
    if likely is None:
        raise RefinementError(
            f"{profile.name}: the calibration of bank {instrument.bank} gives peaks no width "
            f"between {limits[0]:.3g} and {limits[1]:.3g} Å. Check that it is of this instrument."
        )
    band, width = likely
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


@lru_cache(maxsize=256)
def _where_widths_are_likely(
    instrument: Instrument, shortest: float, longest: float
) -> tuple[Band, Array] | None:
    """Return the longest part of a band without extremely narrow peaks, and relative widths there.

    Where polynomials for the widths are used beyond the range that they were fitted in, they fall
    to zero before they are negative. None where peaks have no width anywhere in the band.
    """
    band = where_peaks_are(Band(instrument, shortest, longest, ""))
    if band is None:
        return None
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
