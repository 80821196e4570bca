"""The exact pattern, evaluated peak by peak: what the fast simulator is compared with."""

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
    cells = np.asarray(cell, dtype=np.float64)[None]
    check_volume(cells)
    reflections = unique_reflections(phase, largest_indices(cells, tof[0] / instrument.difc))
    d = d_spacing(reflections.hkl, cells)[0]
    position = instrument.tof_from_d_spacing(d)
    inside = (position > tof[0]) & (position < tof[-1]) & (d >= tof[0] / instrument.difc)
    amplitude = (
        HISTOGRAM_SCALE
        * reflections.multiplicity
        * reflections.f_squared(d, u_scale)
        * abs(np.sin(np.radians(instrument.two_theta / 2)))
        * d**4
        / cell_volume(cells)[0]
    )
    shape = peak_shape(instrument, d, size=size, microstrain=microstrain)
    pattern = np.zeros(len(tof))
    for rows in np.array_split(np.flatnonzero(inside), inside.sum() // 256 + 1):
        of_rows = PeakShape(*(np.asarray(value)[rows, None] for value in shape))
        pattern += amplitude[rows] @ peak(tof - position[rows, None], of_rows, convention)
    return pattern
