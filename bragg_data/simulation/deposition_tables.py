"""Arguments of the compiled loops of the fast simulator: tables, the window, widths, buffers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tables(NamedTuple):
    """Look-up tables.

    ``debye_waller`` (n_groups, n_x): exp(−2π² U_g x) on a uniform grid of x with spacing ``dx``;
    ``rates`` (n_groups,): 2π² U_g; ``log_tof`` and ``inverse_tof`` (n_t,): ln T and 1/T at the
    middle of uniform cells of T that start at ``tof_0`` and are ``dt`` wide.
    """

    debye_waller: NDArray[np.float32]
    rates: NDArray[np.float64]
    dx: float
    log_tof: NDArray[np.float64]
    inverse_tof: NDArray[np.float64]
    tof_0: float
    dt: float


def build_tables(
    u_groups: NDArray[np.float64], x_max: float, tof_low: float, tof_high: float
) -> Tables:
    """Build the tables for 1/d² up to ``x_max`` (times the U scale) and a TOF range in µs."""
    rates = 2 * np.pi**2 * u_groups
    # A cell is so small that the third-order series is exact to 1e-10.
    dx = 0.02 / max(float(rates.max()), 0.02)
    x = (np.arange(math.ceil(x_max / dx) + 2) + 0.5) * dx
    cells = math.ceil((tof_high / tof_low - 1) / 4e-3)
    dt = (tof_high - tof_low) / cells
    centres = tof_low + (np.arange(cells + 1) + 0.5) * dt
    return Tables(
        debye_waller=np.exp(-rates[:, None] * x).astype(np.float32),
        rates=rates,
        dx=dx,
        log_tof=np.log(centres),
        inverse_tof=1 / centres,
        tof_0=tof_low,
        dt=dt,
    )


class Target(NamedTuple):
    """Where amplitudes are deposited.

    The window in µs; the relative step of the pattern's grid and of the source grid, whose node j
    stands at T = tof_low · exp(source_step · (j − pad)); the calibration terms common to all
    samples; the d between which the step of GSAS-II's erfcx falls into the peak.
    """

    tof_low: float
    tof_high: float
    grid_step: float
    source_step: float
    pad: int
    difa: float
    difb: float
    d_step_low: float
    d_step_high: float


class Broadening(NamedTuple):
    """Instrument constants of the peak widths, for samples that each have their own broadening."""

    sig_0: float
    sig_1: float
    sig_2: float
    sig_q: float
    x: float
    y: float
    z: float


class Buffers(NamedTuple):
    """Per-line values of one tile: d (Å), T (µs), position, amplitude, then work space."""

    d: NDArray[np.float64]
    tof: NDArray[np.float64]
    position: NDArray[np.float64]
    amplitude: NDArray[np.float32]
    q: NDArray[np.float64]
    rough_d: NDArray[np.float32]
    cell: NDArray[np.int32]
    delta: NDArray[np.float32]
    damping: NDArray[np.float32]
    strength: NDArray[np.float32]
