"""Arguments of the compiled loops of the fast simulator: tables and the window."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.reflections import Resonance

_RESONANCE_NODES = 8192  # between which b is linear, as between the points of its table


class Tables(NamedTuple):
    """Rates of the Debye-Waller factors, and a table of the lengths of resonant elements."""

    rates: NDArray[np.float64]  # (n_groups,) 2π² U_g
    resonance: NDArray[np.float32]  # (n_groups, n_d) factors on uniform d, n_d ≥ 0
    d_0: float  # where it starts, in Å
    dd: float  # its spacing


def build_tables(
    u_groups: NDArray[np.float64], resonances: Sequence[Resonance], d: tuple[float, float]
) -> Tables:
    """Build the tables; the range of d, in Å, is that of the resonant lengths."""
    nodes = np.linspace(*d, _RESONANCE_NODES if resonances else 0)
    factors = np.ones((len(u_groups), len(nodes)), dtype=np.float32)
    for resonance in resonances:
        factors[resonance.group] = resonance.length(nodes)
    spacing = (d[1] - d[0]) / (_RESONANCE_NODES - 1)
    return Tables(rates=2 * np.pi**2 * u_groups, resonance=factors, d_0=d[0], dd=spacing)


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
