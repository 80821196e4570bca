"""The exact pattern, evaluated peak by peak: what the fast simulator is compared with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bragg_data.crystallography.cell import cell_volume, check_volume, d_spacing
from bragg_data.crystallography.reflections import largest_indices, unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.instrument.peak_shape import Convention, PeakShape, peak, peak_shape
from bragg_data.simulation.kinematic import HISTOGRAM_SCALE


def exact_pattern(
    phase: Phase,
    cell: ArrayLike,
    instrument: Instrument,
    tof: NDArray[np.float64],
    *,
    size: float,
    microstrain: float,
    u_scale: float = 1.0,
    convention: Convention = "gsas2",
) -> NDArray[np.float64]:
    r"""Return one pattern, evaluated peak by peak in double precision: slow, the reference.

    .. math:: y(T) = \sum_h A_h P(T - T_h), \quad
              A_h = S\, m_h |F_h|^2 |\sin\theta|\, d_h^4 / V

    Parameters
    ----------
    phase, cell : cell of shape (6,)
        Structure, and the cell in ångström and degrees.
    instrument, tof : tof of shape (points,)
        Calibration and peak shape, and the ascending times of flight in µs. A reflection counts
        only between the first and the last.
    size, microstrain
        Isotropic Lorentzian broadening in µm and 1e-6.
    u_scale
        Factor on all displacement parameters.
    convention
        See :data:`bragg_data.instrument.peak_shape.Convention`.

    Returns
    -------
    shape (points,)
        Intensity per µs.
    """
    (pattern,) = exact_patterns(
        [phase],
        cell,
        instrument,
        tof,
        size=size,
        microstrain=microstrain,
        u_scale=u_scale,
        convention=convention,
    )
    return pattern


def exact_patterns(
    phases: Sequence[Phase],
    cell: ArrayLike,
    instrument: Instrument,
    tof: NDArray[np.float64],
    *,
    size: float,
    microstrain: float,
    u_scale: float = 1.0,
    convention: Convention = "gsas2",
) -> NDArray[np.float64]:
    """As :func:`exact_pattern`, (n, points), of n structures in one cell and one space group.

    They have their peaks in common, which take the time.
    """
    cells = np.asarray(cell, dtype=np.float64)[None]
    check_volume(cells)
    limits = largest_indices(cells, tof[0] / instrument.difc)
    of_phases = [unique_reflections(phase, limits) for phase in phases]
    reflections = of_phases[0]
    for other in of_phases[1:]:
        np.testing.assert_array_equal(other.hkl, reflections.hkl)
    d = d_spacing(reflections.hkl, cells)[0]
    position = instrument.tof_from_d_spacing(d)
    inside = (position > tof[0]) & (position < tof[-1]) & (d >= tof[0] / instrument.difc)
    amplitude = (
        HISTOGRAM_SCALE
        * reflections.multiplicity
        * np.stack([of_phase.f_squared(d, u_scale) for of_phase in of_phases])
        * abs(np.sin(np.radians(instrument.two_theta / 2)))
        * d**4
        / cell_volume(cells)[0]
    )
    shape = peak_shape(instrument, d, size=size, microstrain=microstrain)
    patterns = np.zeros((len(phases), len(tof)))
    # A few at a time: what is computed on the way stays in the processor's cache.
    for rows in np.array_split(np.flatnonzero(inside), inside.sum() // 8 + 1):
        of_rows = PeakShape(*(None if v is None else v[rows] for v in shape)).columns()
        patterns += amplitude[:, rows] @ peak(tof - position[rows, None], of_rows, convention)
    return patterns
