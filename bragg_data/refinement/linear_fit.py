"""The pattern of a cell against a measurement: scale and background by linear least squares."""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CrystalError, check_volume, d_spacing
from bragg_data.crystallography.reflections import largest_indices, unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.result import PatternFit, RefinementError, pattern_fit_on_grid
from bragg_data.simulation.kinematic import Simulator

# True patterns fit pseudo-experiments with 14 to a reduced χ² of 1, with 8 to 1.0 to 3.3.
BACKGROUND_TERMS = 14
_VISIBLE = 1e-3  # of the strongest peak's height
_FEWEST = 20  # points more than parameters, below which a χ² means nothing

_simulators: dict[str, Simulator] = {}  # building one takes longer than simulating a few patterns


def simulator_of(campaign: Campaign) -> Simulator:
    """Return the fast simulator of a campaign; the last campaign's is cached."""
    identity = json.dumps(campaign.definition, sort_keys=True)
    if identity not in _simulators:
        _simulators.clear()
        _simulators[identity] = Simulator(*campaign.setup)
    return _simulators[identity]


def fit_cells(
    campaign: Campaign,
    phases: Sequence[int] | NDArray[np.integer],
    cells: Array,
    profiles: Sequence[GriddedProfile],
) -> list[PatternFit | None]:
    """Simulate cells (n, 6) in ångström and degrees, and fit scale and background of each pattern.

    Each is fitted to its own measurement, which still has its background. None where the cell
    cannot be simulated (it encloses no volume, is not finite) or has no peak in the covered part of
    the grid.
    """
    fits: list[PatternFit | None] = []
    for phase, cell, profile in zip(phases, cells, profiles, strict=True):
        try:
            (pattern,) = simulator_of(campaign).simulate(np.array([phase]), cell[None])
            fits.append(fit_scale_and_background(profile, pattern))
        except (CrystalError, RefinementError):
            fits.append(None)
    return fits


@lru_cache(maxsize=8)
def _polynomials(points: int) -> Array:
    x = np.linspace(-1, 1, points)
    return np.asarray(chebyshev.chebvander(x, BACKGROUND_TERMS - 1), dtype=np.float64)


def background_basis(gridded: GriddedProfile) -> Array:
    """Return orthonormal columns (fitted points, terms) that span the weighted background.

    The background consists of Chebyshev polynomials of the first kind over the grid's points, which
    is over the logarithm of the time of flight.
    """
    fitted = gridded.informative
    return np.linalg.qr(_polynomials(len(fitted))[fitted] / gridded.sigma[fitted, None])[0]


def fit_scale_and_background(
    gridded: GriddedProfile, pattern: ArrayLike, basis: Array | None = None
) -> PatternFit:
    """Fit scale and background of a pattern to a measurement, by weighted linear least squares.

    The pattern, (points,), is on the grid of the measurement; the ``basis`` is its
    :func:`background_basis`, where that is known. Raises a RefinementError if too few points are
    covered, or the pattern vanishes there.
    """
    simulated = np.asarray(pattern, dtype=np.float64)
    fitted = gridded.informative
    degrees_of_freedom = int(fitted.sum()) - BACKGROUND_TERMS - 1
    if degrees_of_freedom < _FEWEST:
        raise RefinementError(
            f"{fitted.sum()} points are covered, too few to fit a scale and a background of "
            f"{BACKGROUND_TERMS} terms: at least {_FEWEST + BACKGROUND_TERMS + 1} are needed."
        )
    if not simulated[fitted].any():
        raise RefinementError(
            f"The simulated pattern has no peak in the covered part of the grid "
            f"({fitted.sum()} points), so its scale cannot be fitted. Check the cell."
        )
    basis = background_basis(gridded) if basis is None else basis
    sigma, largest = gridded.sigma[fitted], float(np.abs(simulated).max())
    y, peaks = gridded.intensity[fitted] / sigma, simulated[fitted] / largest / sigma
    above, rest = peaks - basis @ (peaks @ basis), y - basis @ (y @ basis)
    # Peaks that point down explain nothing.
    scale = max(float(above @ rest) / max(float(above @ above), 1e-300), 0.0)
    difference = rest - scale * above
    background = y - difference - scale * peaks
    curves = (y - difference) * sigma, background * sigma, difference * sigma
    chi2 = float(difference @ difference)
    of_fit = scale / largest, chi2, chi2 / degrees_of_freedom
    return pattern_fit_on_grid(gridded, fitted, curves, *of_fit)


def explained_fraction(fit: PatternFit) -> float:
    """Return the fraction of the weighted signal above the background that a pattern explains.

    Noise, which adds 1 to every weighted square, is left out of the signal and of what remains: a
    perfect pattern explains all, however noisy the measurement.
    """
    remains = max(fit.reduced_chi2 - 1, 0.0)
    signal = fit.reduced_chi2 / max(fit.rwp_background**2, 1e-12) - 1
    return float(np.clip(1 - remains / max(signal, 1e-12), 0.0, 1.0))


def reflection_positions(
    phase: Phase, cell: ArrayLike, campaign: Campaign, *, visible: float = _VISIBLE
) -> tuple[Array, NDArray[np.int64]]:
    """Return times of flight and indices of a cell's reflections on a campaign's grid.

    As :func:`reflections_within`.
    """
    ends = float(campaign.grid.tof[0]), float(campaign.grid.tof[-1])
    return reflections_within(phase, cell, campaign.instrument, ends, visible=visible)


def reflections_within(
    phase: Phase,
    cell: ArrayLike,
    instrument: Instrument,
    ends: tuple[float, float],
    *,
    visible: float = _VISIBLE,
) -> tuple[Array, NDArray[np.int64]]:
    """Return times of flight (n,), ascending in µs, and indices (n, 3) of a cell's reflections.

    Between two times in µs. None for a cell, (6,) in Å and degrees, that cannot be simulated.
    ``visible`` is the fraction of the greatest intensity per width (T · m |F|² d⁴ over T) below
    which a reflection is left out.
    """
    cells = np.asarray(cell, dtype=np.float64)[None]
    shortest = ends[0] / instrument.difc
    try:
        check_volume(cells)
        reflections = unique_reflections(phase, largest_indices(cells, shortest))
    except CrystalError:
        return np.empty(0), np.empty((0, 3), dtype=np.int64)
    d = d_spacing(reflections.hkl, cells)[0]
    inside = d >= shortest
    position = np.where(inside, instrument.tof_from_d_spacing(d), 0.0)
    inside &= (position > ends[0]) & (position < ends[1])
    height = np.where(inside, reflections.multiplicity * reflections.f_squared(d) * d**3, 0.0)
    visible_rows = np.flatnonzero(height > visible * height.max(initial=0.0))
    order = visible_rows[np.argsort(position[visible_rows])]
    return position[order], reflections.hkl[order]
