"""A cell's pattern over a measurement: simulated, scale and background fitted, how well it fits."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import d_spacing
from bragg_data.crystallography.reflections import unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.simulation.kinematic import Simulator

BACKGROUND_TERMS = 14
"""Chebyshev polynomials of the background, over the logarithm of the time of flight.

With 14 the true patterns fit noisy pseudo-experiments to a reduced χ² of 1; with 8 to 1.0 to 3.3,
with 20 no better.
"""

_VISIBLE = 1e-3  # of the strongest peak's height
_FEWEST = 20  # points more than what is fitted, below which a χ² says nothing

_simulators: dict[str, Simulator] = {}  # building one takes longer than all that is asked of it


class PatternFitError(ValueError):
    """A pattern that cannot be laid over a measurement."""


@dataclass(frozen=True, eq=False)
class PatternFit:
    """A simulated pattern laid over a measurement, on the campaign's grid.

    Attributes
    ----------
    calculated : shape (points,)
        Pattern and background, in the measurement's units; NaN where not covered.
    background : shape (points,)
        The fitted background; NaN where not covered.
    difference : shape (points,)
        Measured less calculated; NaN where not covered.
    scale
        Factor on the simulated intensity; 0 where the best one is negative.
    rwp
        Weighted profile R factor: sqrt(sum w (y - c)² / sum w y²), w = 1/sigma².
    rwp_background
        The same with the background taken off y in the denominator.
    reduced_chi2
        Weighted squared differences over the points less the parameters.
    """

    calculated: NDArray[np.float64]
    background: NDArray[np.float64]
    difference: NDArray[np.float64]
    scale: float
    rwp: float
    rwp_background: float
    reduced_chi2: float


def simulator_of(campaign: Campaign) -> Simulator:
    """Return the fast simulator of a campaign; that of the last campaign asked for is kept."""
    identity = json.dumps(campaign.definition, sort_keys=True)
    if identity not in _simulators:
        _simulators.clear()
        _simulators[identity] = Simulator(
            campaign.phases, campaign.instrument, campaign.grid,
            size=campaign.size, microstrain=campaign.microstrain,
        )  # fmt: skip
    return _simulators[identity]


def fit_scale_and_background(
    gridded: GriddedProfile, pattern: ArrayLike, *, terms: int = BACKGROUND_TERMS
) -> PatternFit:
    """Fit scale and background of a pattern to a measurement, by weighted linear least squares.

    Parameters
    ----------
    gridded
        The measurement on the campaign's grid, with its background.
    pattern : shape (points,)
        Simulated intensity on that grid.
    terms
        Of the background: Chebyshev polynomials of the first kind over the grid's points, which is
        over the logarithm of the time of flight.

    Raises
    ------
    PatternFitError
        If too few points are covered, or the pattern vanishes there.
    """
    simulated = np.asarray(pattern, dtype=np.float64)
    known = gridded.covered & (gridded.sigma > 0)
    free = int(known.sum()) - terms - 1
    if free < _FEWEST or not simulated[known].any():
        raise PatternFitError(
            f"The pattern cannot be laid over the measurement: {known.sum()} points are covered, "
            f"and it has its peaks elsewhere or there are too few of them."
        )
    x = np.linspace(-1, 1, len(simulated))
    polynomials = np.asarray(chebyshev.chebvander(x, terms - 1), dtype=np.float64)
    columns = np.column_stack([simulated / np.abs(simulated).max(), polynomials])
    y, sigma = gridded.intensity[known], gridded.sigma[known]
    fitted = _solved(columns[known], y, sigma)
    if fitted[0] < 0:  # peaks that point down explain nothing
        fitted = np.concatenate([[0.0], _solved(polynomials[known], y, sigma)])
    calculated, background = columns @ fitted, polynomials @ fitted[1:]
    residual = (y - calculated[known]) / sigma
    weighted = np.square(residual).sum()
    above = np.square((y - background[known]) / sigma).sum()
    nowhere = np.where(known, 0.0, np.nan)
    return PatternFit(
        calculated=calculated + nowhere,
        background=background + nowhere,
        difference=gridded.intensity - calculated + nowhere,
        scale=float(fitted[0] / np.abs(simulated).max()),
        rwp=float(np.sqrt(weighted / np.square(y / sigma).sum())),
        rwp_background=float(np.sqrt(weighted / max(above, 1e-300))),
        reduced_chi2=float(weighted / free),
    )


def explained_fraction(overlay: PatternFit) -> float:
    """Return the share of the weighted signal above the background that a pattern explains.

    Noise, which adds 1 to every weighted square, is left out of the signal and of what remains: a
    perfect pattern explains all, however noisy the measurement.
    """
    remains = max(overlay.reduced_chi2 - 1, 0.0)
    signal = overlay.reduced_chi2 / max(overlay.rwp_background**2, 1e-12) - 1
    return float(np.clip(1 - remains / max(signal, 1e-12), 0.0, 1.0))


def _solved(
    columns: NDArray[np.float64], y: NDArray[np.float64], sigma: NDArray[np.float64]
) -> NDArray[np.float64]:
    solution, *_ = np.linalg.lstsq(columns / sigma[:, None], y / sigma, rcond=None)
    return np.asarray(solution)


def reflection_positions(
    phase: Phase, cell: ArrayLike, campaign: Campaign, *, visible: float = _VISIBLE
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return where a cell has its reflections, the weak ones left out.

    Parameters
    ----------
    phase, cell : cell of shape (6,)
        Structure, and its cell in ångström and degrees.
    campaign
        Whose instrument and window.
    visible
        Share of the greatest intensity per width (T · m |F|² d⁴ over T) that counts.

    Returns
    -------
    tof : shape (n,)
        In µs, ascending.
    hkl : shape (n, 3)
        Miller indices.
    """
    cells = np.asarray(cell, dtype=np.float64)[None]
    tof = campaign.grid.tof
    shortest = tof[0] / campaign.instrument.difc
    h, k, l = np.floor(cells[0, :3] / shortest + 1e-9).astype(int)  # noqa: E741
    reflections = unique_reflections(phase, (int(h), int(k), int(l)))
    d = d_spacing(reflections.hkl, cells)[0]
    inside = d >= shortest
    position = np.where(inside, campaign.instrument.tof_from_d_spacing(d), 0.0)
    inside &= (position > tof[0]) & (position < tof[-1])
    height = np.where(inside, reflections.multiplicity * reflections.f_squared(d) * d**3, 0.0)
    kept = height > visible * height.max(initial=0.0)
    order = np.argsort(position[kept])
    return position[kept][order], reflections.hkl[kept][order]
