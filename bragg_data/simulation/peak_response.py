"""The peak shape of an instrument over a time-of-flight grid, as operators for some widths."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx

from bragg_data.instrument import peak_shape as shapes
from bragg_data.instrument.instprm import Instrument, InstrumentError, TofGrid
from bragg_data.instrument.peak_shape import Convention, PeakShape, mixing, peak_shape
from bragg_data.simulation import peak_operator
from bragg_data.simulation.deposition import REACH
from bragg_data.simulation.deposition_tables import Target
from bragg_data.simulation.peak_operator import PAD, QUINTIC, PeakOperator

VERSION = "1"
"""Version of the mathematics, part of a data set's identity: it grows when patterns change."""

_NODES = (4, 4)  # widths that operators are built for, and further ones per factor e between them
_INDEPENDENT = 2e-4  # of a peak: operators that are as near to a mixture of others are left out
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
        self._oversampling, self._band = self._resolution()

    def _tof_at(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.grid.start * np.exp(self.grid.relative_step * position))

    def d_spacing_at(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the d-spacing in ångström at positions, in steps of the grid (any shape)."""
        return self.instrument.d_spacing_from_tof(self._tof_at(position))

    def shape_at(self, position: NDArray[np.float64]) -> PeakShape:
        """Return the nominal peak shape at positions, in steps of the grid (any shape)."""
        # Beyond the window no peak ever stands: there the shape only has to be smooth.
        d = self.d_spacing_at(np.clip(position, 0, self.grid.points - 1))
        return peak_shape(self.instrument, d, size=self.size, microstrain=self.microstrain)

    def _kernel(self, part: str, width_factor: float = 1.0) -> Callable[..., NDArray[np.float64]]:
        """Return the exact profile as :data:`~bragg_data.simulation.peak_operator.Kernel`."""

        def kernel(position: NDArray[np.float64], points: slice) -> NDArray[np.float64]:
            offset = self._tof[points] - self._tof_at(position)[:, None]
            shape = self.shape_at(position)
            width, eta = (value[:, None] for value in mixing(shape.variance, shape.fwhm))
            width = width * width_factor
            rise, decay = shape.rise[:, None], shape.decay[:, None]
            value = np.zeros(offset.shape)
            if part != "lorentzian":
                share = 1 - eta if part == "both" else 1.0
                value += share * shapes.gaussian_part(offset, rise, decay, width, self._erfcx)
            if part != "gaussian":
                share = eta if part == "both" else 1.0
                value += share * shapes.lorentzian_part(offset, rise, decay, width, self.convention)
            return value

        return kernel

    def _resolution(self) -> tuple[int, int]:
        """Choose how fine the source grid is and how wide the near field."""
        position = np.linspace(0, self.grid.points - 1, 257)
        shape = self.shape_at(position)
        bad = ~((shape.rise > 0) & (shape.decay > 0))
        tof, d = self._tof_at(position), self.d_spacing_at(position)
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
        return (self.grid.points - 1) * self._oversampling + 1 + 2 * PAD

    @property
    def _nodes(self) -> NDArray[np.float64]:
        return (np.arange(self.n_source) - PAD) / self._oversampling

    @cached_property
    def shapes(self) -> NDArray[np.float64]:
        """Full width W (µs), Lorentzian share η, rise and decay (1/µs) at the source nodes."""
        shape = self.shape_at(self._nodes)
        return np.stack([*mixing(shape.variance, shape.fwhm), shape.rise, shape.decay])

    @cached_property
    def log_shapes(self) -> NDArray[np.float64]:
        """As :attr:`shapes`, with ln W in place of W."""
        return np.concatenate([np.log(self.shapes[:1]), self.shapes[1:]])

    @cached_property
    def broadening(self) -> tuple[float, ...]:
        """Constants of the peak widths, for samples that each have their own broadening."""
        i = self.instrument
        return i.sig_0, i.sig_1, i.sig_2, i.sig_q, i.x, i.y, i.z

    @cached_property
    def target(self) -> Target:
        """Where the compiled loops deposit amplitudes."""
        low = high = 0.0
        if self.convention == "gsas2":
            width, _, rise, decay = self.shapes
            sigma = width / shapes.FWHM_PER_SIGMA
            d = self.d_spacing_at(self._nodes)
            falls = np.zeros(len(d), dtype=bool)
            for rate in (rise, decay):
                middle = np.abs(shapes.ERFCX_SWITCH * np.sqrt(2) - rate * sigma)
                falls |= middle - shapes.BLEND * np.sqrt(2) < REACH
            if falls.any():
                low, high = 0.99 * d[falls].min(), 1.01 * d[falls].max()
        return Target(
            tof_low=self.grid.start,
            tof_high=self.grid.stop,
            grid_step=self.grid.relative_step,
            source_step=self.grid.relative_step / self._oversampling,
            pad=PAD,
            difa=self.instrument.difa,
            difb=self.instrument.difb,
            d_step_low=low,
            d_step_high=high,
        )

    @cached_property
    def operator(self) -> PeakOperator:
        """The operator of the nominal peak; warns if it is good to worse than 3e-4 of a peak."""
        operator = self.build("both")
        error = self.interpolation_error(operator)
        if error > _TOLERANCE:
            warnings.warn(
                f"Peaks of this instrument are narrow on this grid: patterns of the fast simulator "
                f"are within {error:.1e} of a peak's maximum, not {_TOLERANCE:g}. "
                f"A finer grid helps.",
                stacklevel=4,
            )
        return operator

    def build(self, part: str, width_factor: float = 1.0) -> PeakOperator:
        """Build an operator: of the ``gaussian`` part, the ``lorentzian`` part or ``both``.

        A part is not weighted with its share of the peak; the factor is on the nominal full width.
        """
        kernel = self._kernel(part, width_factor)
        return peak_operator.build_operator(
            kernel, self.grid.points, self._oversampling, self._band
        )

    def interpolation_error(self, operator: PeakOperator) -> float:
        """Largest error of the operator for single peaks, relative to each peak's maximum."""
        position = np.random.default_rng(0).uniform(0, self.grid.points - 1, 40)
        deposits = np.zeros((len(position), self.n_source), dtype=np.float32)
        node = position * self._oversampling + PAD
        for row, (x, j) in enumerate(zip(*np.modf(node), strict=True)):
            weights = [QUINTIC(x + 5 - k) for k in range(6)]
            deposits[row, int(j) - 2 : int(j) + 4] = weights
        patterns = np.zeros((len(position), self.grid.points), dtype=np.float32)
        operator.add(deposits, patterns)
        exact = self._kernel("both")(position, slice(0, self.grid.points))
        return float((np.abs(patterns - exact).max(axis=1) / exact.max(axis=1)).max())


class WidthOperators(NamedTuple):
    """Operators of the Gaussian, then the Lorentzian part, at nodes of ln(W / W nominal).

    They are alike: ``mixing`` (2 * n_nodes, n) expresses each by fewer ``operators``.
    """

    nodes: NDArray[np.float64]
    barycentric: NDArray[np.float64]
    mixing: NDArray[np.float64]
    operators: tuple[PeakOperator, ...]


class WidthInterpolation:
    """Builds the operators for a range of widths, which takes seconds, and keeps them.

    The range of ln(W / W nominal) is prepared whatever the samples; None takes their range. The
    files in the cache, a directory, can be deleted at any time; None for none.
    """

    def __init__(
        self, response: PeakResponse, width_range: tuple[float, float] | None, cache: Path | None
    ) -> None:
        self._response, self._width_range, self._cache = response, width_range, cache
        self._operators = lru_cache(maxsize=2)(self._build)

    def operators(self, samples: Mapping[str, NDArray[np.float64]]) -> WidthOperators:
        """Return the operators for samples with these parameters, each of shape (n,)."""
        return self._operators(*self._range(samples))

    def _range(self, samples: Mapping[str, NDArray[np.float64]]) -> tuple[float, float]:
        """Range of ln(W / W nominal) over samples and the window, rounded outwards."""
        d, nominal = self._nominal_widths
        low, high = np.inf, -np.inf
        for difc in (samples["difc"].min(), samples["difc"].max()):
            shape = peak_shape(
                self._response.instrument.with_parameters(difc=float(difc)),
                d,
                size=samples["size"][:, None],
                microstrain=samples["microstrain"][:, None],
            )
            variance = np.broadcast_to(shape.variance, shape.fwhm.shape)
            width, _ = mixing(variance, shape.fwhm)
            ratio = np.log(width * samples["width_scale"][:, None] / nominal)
            low, high = min(low, ratio.min()), max(high, ratio.max())
        parts = 10
        if self._width_range:
            if self._width_range[0] <= low and high <= self._width_range[1]:
                return self._width_range
            parts = 2  # coarser, so that what is built for these samples serves the next ones
        low, high = np.floor((low - 0.01) * parts), np.ceil((high + 0.01) * parts)
        return float(low / parts), float(high / parts)

    @cached_property
    def _nominal_widths(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """d-spacings all over the window, and the nominal widths there in µs."""
        response = self._response
        position = np.linspace(0, response.grid.points - 1, 65)
        return response.d_spacing_at(position), mixing(*response.shape_at(position)[2:])[0]

    def _build(self, low: float, high: float) -> WidthOperators:
        count = _NODES[0] + int(np.ceil(_NODES[1] * (high - low)))
        angle = (2 * np.arange(count) + 1) * np.pi / (2 * count)
        nodes = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(angle)
        barycentric = np.where(np.arange(count) % 2, -1.0, 1.0) * np.sin(angle)
        file = None if self._cache is None else self._cache / f"{self._key(low, high)}.npz"
        cached = None if file is None else peak_operator.load_operators(file)
        if cached is not None:
            return WidthOperators(nodes, barycentric, *cached)
        parts = [name for name in ("gaussian", "lorentzian") for _ in nodes]
        factors = [float(np.exp(node)) for node in nodes] * 2
        with ThreadPoolExecutor() as pool:
            operators = list(pool.map(self._response.build, parts, factors))
        built = peak_operator.independent(operators, _INDEPENDENT)
        with suppress(OSError):  # it is built again the next time
            if file is not None:
                peak_operator.save_operators(file, *built)
        return WidthOperators(nodes, barycentric, *built)

    def _key(self, low: float, high: float) -> str:
        """Return a name for the operators of a range of widths, and all that they depend on."""
        r = self._response
        of_response = (VERSION, r.instrument, r.grid, r.size, r.microstrain, r.convention)
        dependencies = (*of_response, low, high, _NODES, _INDEPENDENT)
        return hashlib.sha256(repr(dependencies).encode()).hexdigest()[:16]
