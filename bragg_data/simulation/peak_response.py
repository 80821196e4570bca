"""The peak shape of an instrument over a time-of-flight grid, and what draws it."""

import warnings
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erfcx

from bragg_data.arrays import Array
from bragg_data.instrument import peak_shape as shapes
from bragg_data.instrument.instprm import Instrument, InstrumentError, TofGrid
from bragg_data.instrument.peak_shape import Convention, PeakShape, mixing, peak_shape
from bragg_data.simulation import peak_operator
from bragg_data.simulation.deposition import REACH
from bragg_data.simulation.deposition_tables import Target
from bragg_data.simulation.peak_operator import PAD, QUINTIC, PeakOperator
from bragg_data.simulation.shape_basis import MARGIN, ShapeBasis, build_basis, stations
from bragg_data.simulation.width_coefficients import coefficients, width_range

VERSION = "1"
"""Version of the mathematics, part of a data set's identity: it grows when patterns change."""

_NODES = (4, 4)  # widths that operators are built for, and further ones per factor e between them
_INDEPENDENT = 8e-5  # of a peak: shapes that come as near to a mixture of others are left out
_EXTREME = (-2.0, 4.0)  # of ln(W / W nominal): beyond, operators would take gigabytes
_SMOOTH = 45.0  # points: what is this wide is smooth enough for the first coarser grid everywhere
_STRETCH = 2e-3  # relative change of d, for the slopes of profiles
WIDTH_PARAMETERS = ("difc", "tzero", "size", "microstrain", "width_scale")
"""What changes a sample's peak shapes."""

_TOLERANCE = 3e-4  # of a single peak's maximum; sums of peaks come out several times better


class PeakResponse:
    """How peaks of nominal width look all over a grid, and the operator that draws them.

    Size in µm and microstrain in 1e-6 are the nominal broadening. An InstrumentError is raised if
    the instrument's constants give peaks no decay somewhere on the grid.
    """

    def __init__(
        self,
        instrument: Instrument,
        grid: TofGrid,
        size: float,
        microstrain: float,
        convention: Convention,
    ) -> None:
        self.instrument, self.grid = instrument, grid
        self.size, self.microstrain, self.convention = size, microstrain, convention
        self._erfcx = shapes.erfcx_blended if convention == "gsas2" else erfcx
        self._tof = grid.tof
        self.oversampling, self._band = self._resolution()

    def tof_at(self, position: Array) -> Array:
        """Return times of flight in µs at positions, in steps of the grid (any shape)."""
        return np.asarray(self.grid.start * np.exp(self.grid.relative_step * position))

    def d_spacing_at(self, position: Array) -> Array:
        """Return the d-spacing in ångström at positions, in steps of the grid (any shape)."""
        return self.instrument.d_spacing_from_tof(self.tof_at(position))

    def shape_at(self, position: Array) -> PeakShape:
        """Return the nominal peak shape at positions, in steps of the grid (any shape)."""
        # Beyond the window no peak ever stands: there the shape only has to be smooth.
        d = self.d_spacing_at(np.clip(position, 0, self.grid.points - 1))
        return peak_shape(self.instrument, d, size=self.size, microstrain=self.microstrain)

    def parts(self, offset: Array, shape: PeakShape, width: Array) -> tuple[Array, Array]:
        """Return the Gaussian and the Lorentzian part in 1/µs; arguments as of parts of peaks."""
        return shapes.parts(offset, shape, width, self.convention, self._erfcx)

    def _kernel(self, position: Array, points: slice) -> Array:
        """Return the exact profile: a :data:`~bragg_data.simulation.peak_operator.Kernel`."""
        offset = self._tof[points] - self.tof_at(position)[:, None]
        shape = self.shape_at(position)
        width, eta = (value[:, None] for value in mixing(shape.variance, shape.fwhm))
        gauss, lorentz = self.parts(offset, shape.columns(), width)
        return (1 - eta) * gauss + eta * lorentz

    def _resolution(self) -> tuple[int, int]:
        """Choose how fine the source grid is and how wide the near field."""
        position = np.linspace(0, self.grid.points - 1, 257)
        shape = self.shape_at(position)
        bad = ~((shape.rise > 0) & (shape.decay > 0))
        tof, d = self.tof_at(position), self.d_spacing_at(position)
        if bad.any():
            raise InstrumentError(
                f"Bank {self.instrument.bank} gives peaks no decay between {tof[bad].min():.0f} "
                f"and {tof[bad].max():.0f} µs (d = {d[bad].min():.3f} to {d[bad].max():.3f} Å): "
                f"beta-0 + beta-1/d⁴ + beta-q/d² is not positive there. Choose a grid without this "
                f"range."
            )
        step = tof * self.grid.relative_step
        width = mixing(shape.variance, shape.fwhm)[0] / step
        tail = 1 / np.minimum(shape.rise, shape.decay) / step
        # A quintic spline with 1.9 nodes per σ is good to about 1e-5 of the peak.
        oversampling = int(np.clip(np.ceil(1.9 * shapes.FWHM_PER_SIGMA / width.min()), 1, 8))
        band = int(np.ceil(max(16 * np.max(width), 10 * min(np.max(tail), 50.0), 48.0)))
        return oversampling, min(band, self.grid.points)

    @property
    def n_source(self) -> int:
        """Nodes of the source grid."""
        return (self.grid.points - 1) * self.oversampling + 1 + 2 * PAD

    @property
    def _nodes(self) -> Array:
        return (np.arange(self.n_source) - PAD) / self.oversampling

    @cached_property
    def shapes(self) -> Array:
        """Full width W (µs), Lorentzian share η, rise and decay (1/µs) at the source nodes."""
        shape = self.shape_at(self._nodes)
        return np.stack([*mixing(shape.variance, shape.fwhm), shape.rise, shape.decay])

    @cached_property
    def broadening(self) -> tuple[float, ...]:
        """Constants of the peak widths, for samples that each have their own broadening."""
        i = self.instrument
        return i.sig_0, i.sig_1, i.sig_2, i.sig_q, i.x, i.y, i.z

    @cached_property
    def target(self) -> Target:
        """Where the compiled loops deposit amplitudes."""
        low = high = 0.0
        if self.convention == "gsas2" and self.instrument.moderator is None:
            width, _, rise, decay = self.shapes
            sigma = width / shapes.FWHM_PER_SIGMA
            d = self.d_spacing_at(self._nodes)
            falls = np.zeros(len(d), dtype=bool)
            for rate in (rise, decay):
                middle = np.abs(shapes.ERFCX_SWITCH * np.sqrt(2) - rate * sigma)
                falls |= middle - shapes.BLEND * np.sqrt(2) < REACH
            if falls.any():
                low, high = 0.99 * float(d[falls].min()), 1.01 * float(d[falls].max())
        return Target(
            tof_low=self.grid.start,
            tof_high=self.grid.stop,
            grid_step=self.grid.relative_step,
            source_step=self.grid.relative_step / self.oversampling,
            pad=PAD,
            difa=self.instrument.difa,
            difb=self.instrument.difb,
            d_step_low=low,
            d_step_high=high,
        )

    @cached_property
    def operator(self) -> PeakOperator:
        """The operator of the nominal peak; warns if it is good to worse than 3e-4 of a peak."""
        operator = peak_operator.build_operator(
            self._kernel, self.grid.points, self.oversampling, self._band
        )
        error = self.interpolation_error(operator)
        if error > _TOLERANCE:
            warnings.warn(
                f"Peaks of this instrument are narrow on this grid: patterns of the fast simulator "
                f"are within {error:.1e} of a peak's maximum, not {_TOLERANCE:g}. "
                f"A finer grid helps.",
                stacklevel=4,
            )
        return operator

    def interpolation_error(self, operator: PeakOperator) -> float:
        """Largest error of the operator for single peaks, relative to each peak's maximum."""
        position = np.random.default_rng(0).uniform(0, self.grid.points - 1, 40)
        deposits = np.zeros((len(position), self.n_source), dtype=np.float32)
        node = position * self.oversampling + PAD
        for row, (x, j) in enumerate(zip(*np.modf(node), strict=True)):
            weights = [QUINTIC(x + 5 - k) for k in range(6)]
            deposits[row, int(j) - 2 : int(j) + 4] = weights
        patterns = np.zeros((len(position), self.grid.points), dtype=np.float32)
        operator.add(deposits, patterns)
        exact = self._kernel(position, slice(0, self.grid.points))
        return float((np.abs(patterns - exact).max(axis=1) / exact.max(axis=1)).max())


class Widths(NamedTuple):
    """A basis of peak shapes, and what the coefficients of a sample's profiles need."""

    basis: ShapeBasis
    interval: tuple[float, float]  # of ln(W / W nominal), over which they are polynomials
    rates: Array  # (2, n_source) rise and decay at the source nodes, 1/µs
    target: Target  # the source grid


class WidthInterpolation:
    """Builds the basis of peak shapes for a range of widths, which takes half a second.

    The range of ln(W / W nominal) is prepared whatever the samples; None takes their range. The
    ``stations`` are where coefficients are computed: T (µs), ln W and d (Å), nominal.
    """

    def __init__(self, response: PeakResponse, prepared: tuple[float, float] | None) -> None:
        self._response, self._prepared = response, prepared
        self._widths = lru_cache(maxsize=8)(self._build)
        self._position = stations(response.grid.points)
        inside = response.shape_at(np.linspace(0, response.grid.points - 1, 257))
        self._least = (
            0.3 * inside.rise.min(),
            0.3 * inside.decay.min(),
            0.02 * inside.variance.min(),
        )
        shape = self._shape(self._position)
        log_width = np.log(mixing(shape.variance, shape.fwhm)[0])
        d = response.d_spacing_at(self._position)
        self.stations = response.tof_at(self._position), log_width, d

    def widths(
        self, samples: Mapping[str, Array], limits: tuple[float, float] | None = None
    ) -> Widths:
        """Return the basis for samples with these parameters, each of shape (n,).

        ``limits`` are of their ln(W / W nominal), where they are known.
        """
        scale = samples["width_scale"]
        scales = (
            min(0.9, float(np.floor(scale.min() * 10) / 10)),
            max(1.1, float(np.ceil(scale.max() * 10) / 10)),
        )
        limits = limits or width_range(*self._arguments(samples))
        return self._widths(*self._range(*limits), *scales)

    def coefficients(
        self, widths: Widths, samples: Mapping[str, Array], *, derivatives: bool = False
    ) -> Array:
        """Return what :meth:`ShapeBasis.convolve` takes: (n, rows, zones, stations, K).

        One row; with ``derivatives`` five more, by the parameters of :data:`WIDTH_PARAMETERS`.
        """
        members = widths.basis.members
        shape = len(samples["size"]), 6 if derivatives else 1, *members.shape[1:]
        out = np.empty(shape, dtype=members.dtype)
        coefficients(out, *self._arguments(samples), widths.interval, members)
        return out

    def _arguments(self, samples: Mapping[str, Array]) -> tuple[Any, ...]:
        response = self._response
        values = tuple(samples[name] for name in WIDTH_PARAMETERS)
        return values, response.target, self.stations, response.broadening

    def _shape(self, position: Array, stretch: float = 1.0) -> PeakShape:
        """Return the nominal shape, with d times a factor, also a little beyond the window."""
        response = self._response
        d = response.d_spacing_at(position)
        shape = peak_shape(
            response.instrument, stretch * d, size=response.size, microstrain=response.microstrain
        )
        return shape._replace(
            rise=np.maximum(shape.rise, self._least[0]),
            decay=np.maximum(shape.decay, self._least[1]),
            variance=np.maximum(shape.variance, self._least[2]),
        )

    def _range(self, low: float, high: float) -> tuple[float, float]:
        """Return the range to prepare for samples' ln(W / W nominal), rounded outwards."""
        parts = 10
        low, high = max(low, _EXTREME[0]), min(high, _EXTREME[1])
        if self._prepared:
            if self._prepared[0] <= low and high <= self._prepared[1]:
                return self._prepared
            # Coarser and no narrower, so that what is built for these serves the next ones.
            parts = 2
            low, high = min(low, self._prepared[0] + 0.01), max(high, self._prepared[1] - 0.01)
        low, high = np.floor((low - 0.01) * parts), np.ceil((high + 0.01) * parts)
        return float(low / parts), float(high / parts)

    def _build(self, low: float, high: float, smallest: float, largest: float) -> Widths:
        response = self._response
        count = _NODES[0] + int(np.ceil(_NODES[1] * (high - low)))
        angle = (2 * np.arange(count) + 1) * np.pi / (2 * count)
        factors = np.exp(0.5 * (low + high) + 0.5 * (high - low) * np.cos(angle))[:, None, None]
        # From values at the nodes to coefficients of Chebyshev polynomials.
        transform = np.cos(np.arange(count)[:, None] * angle) * 2 / count
        transform[0] /= 2
        relative_step = response.grid.relative_step

        def profiles(position: Array, offsets: Array) -> tuple[Array, Array]:
            offset = response.tof_at(position)[:, None] * np.expm1(relative_step * offsets)
            shape = self._shape(position)
            width = factors * mixing(shape.variance, shape.fwhm)[0][:, None]
            gauss, lorentz = response.parts(offset, shape.columns(), width)
            # The Gaussian width is the instrument's, but for a common scale: what remains is
            # the Lorentzian one.
            needed = []
            for scale in np.linspace(smallest, largest, 3):
                eta = shapes.share_at_width(
                    width / (scale * np.sqrt(np.maximum(shape.variance, 1e-10)))[:, None]
                )
                needed.append((1 - eta) * gauss + eta * lorentz)
            # Where another calibration puts another d-spacing, only exponentials change.
            other = self._shape(position, 1 + _STRETCH)
            moved = response.parts(offset, other.columns(), width)
            slopes = [(m - p) / _STRETCH for m, p in zip(moved, (gauss, lorentz), strict=True)]
            members = np.stack([gauss, lorentz, *slopes])
            polynomials = np.einsum("jm,pm...->pj...", transform, members)
            return np.stack(needed), polynomials.reshape(-1, *members.shape[2:])

        tof, log_width, _ = self.stations
        shape, step = self._shape(self._position), tof * relative_step
        widest = float((np.exp(log_width) / step).max()) * np.exp(high)
        tail = float((1 / np.minimum(shape.rise, shape.decay) / step).max())
        bands = (
            int(np.ceil(max(3 * min(widest, _SMOOTH), 3 * min(tail, 12.0), 12.0))),
            int(np.ceil(max(14 * widest, 7 * min(tail, 64.0), 112.0))),
        )
        basis = build_basis(
            profiles, response.grid.points, response.oversampling, bands, _INDEPENDENT
        )
        source = self._shape(np.arange(basis.n_source) / basis.oversampling - MARGIN)
        target = response.target._replace(pad=MARGIN * basis.oversampling)
        return Widths(basis, (low, high), np.stack([source.rise, source.decay]), target)


@lru_cache(maxsize=32)
def peak_response(
    instrument: Instrument,
    grid: TofGrid,
    size: float,
    microstrain: float,
    convention: Convention,
    width_range: tuple[float, float] | None,
) -> tuple[PeakResponse, WidthInterpolation]:
    """Return how peaks look, which is the same for all phases: it takes most of the time."""
    response = PeakResponse(instrument, grid, size, microstrain, convention)
    return response, WidthInterpolation(response, width_range)
