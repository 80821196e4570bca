"""Operators for peak widths that differ from sample to sample, by interpolation in the width."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.simulation.peak_operator import (
    PeakOperator,
    independent,
    load_operators,
    save_operators,
)
from bragg_data.simulation.peak_response import VERSION, PeakResponse

_NODES = (4, 4)  # widths that operators are built for, and further ones per factor e between them
_INDEPENDENT = (
    2e-4  # of a peak: operators that differ by less from a mixture of others are left out
)


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
        cached = None if file is None else load_operators(file)
        if cached is not None:
            return WidthOperators(nodes, barycentric, *cached)
        parts = [name for name in ("gaussian", "lorentzian") for _ in nodes]
        factors = [float(np.exp(node)) for node in nodes] * 2
        with ThreadPoolExecutor() as pool:
            operators = list(pool.map(self._response.build, parts, factors))
        built = independent(operators, _INDEPENDENT)
        if file is not None:
            with suppress(OSError):  # it is built again the next time
                file.parent.mkdir(parents=True, exist_ok=True)
                save_operators(file, *built)
        return WidthOperators(nodes, barycentric, *built)

    def _key(self, low: float, high: float) -> str:
        """Return a name for the operators of a range of widths, and all that they depend on."""
        r = self._response
        of_response = (VERSION, r.instrument, r.grid, r.size, r.microstrain, r.convention)
        dependencies = (*of_response, low, high, _NODES, _INDEPENDENT)
        return hashlib.sha256(repr(dependencies).encode()).hexdigest()[:16]
