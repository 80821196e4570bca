"""Arguments of the compiled loops of the fast simulator: tables and the window."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.reflections import Resonance

_RESONANCE_NODES = 8192  # between which b is linear, as between the points of its table


class Tables(NamedTuple):
    """Look-up tables of the Debye-Waller factor, and of ln T and 1/T."""

    debye_waller: NDArray[np.float32]  # (n_groups, n_x) exp(−2π² U_g x) on a uniform grid of x
    rates: NDArray[np.float64]  # (n_groups,) 2π² U_g
    dx: float  # spacing of x
    log_tof: NDArray[np.float64]  # (n_t,) at the middle of uniform cells of T, as the next
    inverse_tof: NDArray[np.float64]
    tof_0: float  # where the first cell starts
    dt: float  # width of a cell
    resonance: NDArray[np.float32]  # (n_groups, n_d) factors on uniform d, n_d ≥ 0
    d_0: float  # where it starts, in Å
    dd: float  # its spacing


def build_tables(
    u_groups: NDArray[np.float64],
    x_max: float,
    tof: tuple[float, float],
    resonances: Sequence[Resonance] = (),
    d: tuple[float, float] = (0.0, 1.0),
) -> Tables:
    """Build the tables for 1/d² up to ``x_max`` (times the U scale) and ranges of TOF in µs.

    And of d, in Å, over which the factors of resonances are tabulated.
    """
    tof_low, tof_high = tof
    nodes = np.linspace(*d, _RESONANCE_NODES if resonances else 0)
    factors = np.ones((len(u_groups), len(nodes)), dtype=np.float32)
    for resonance in resonances:
        factors[resonance.group] = resonance.length(nodes)
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
        resonance=factors,
        d_0=d[0],
        dd=(d[1] - d[0]) / (_RESONANCE_NODES - 1),
    )


class Target(NamedTuple):
    """Where amplitudes are deposited.

    Node j of the source grid stands at T = tof_low · exp(source_step · (j − pad)).
    """

    tof_low: float  # the window in µs
    tof_high: float
    grid_step: float  # relative, of the pattern's grid
    source_step: float  # relative, of the source grid
    pad: int
    difa: float  # common to all samples
    difb: float
    d_step_low: float  # Å; between these the step of GSAS-II's erfcx falls into the peak
    d_step_high: float
