"""What may differ from sample to sample besides its cell."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from bragg_data.arrays import Array, Indices
from bragg_data.crystallography.cell import check_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument


class SampleParameters(TypedDict, total=False):
    """Keyword arguments of simulators: each a number or of shape (n,), nominal where left out."""

    u_scale: ArrayLike  # factor on the displacement parameters of the phase
    size: ArrayLike  # isotropic Lorentzian broadening in µm
    microstrain: ArrayLike  # the same, in 1e-6
    tzero: ArrayLike  # calibration of the measurement, in µs
    difc: ArrayLike  # the same, in µs/Å
    width_scale: ArrayLike  # factor on the widths of all peaks; the fast simulator alone has it


def nominal_sample(instrument: Instrument, size: float, microstrain: float) -> dict[str, float]:
    """Return the parameters of samples like those that an instrument was calibrated with."""
    calibration = {"tzero": instrument.tzero, "difc": instrument.difc}
    return {"u_scale": 1.0, "size": size, "microstrain": microstrain, **calibration}


def checked_samples(
    phases: Sequence[Phase],
    phase: ArrayLike,
    cells: ArrayLike,
    parameters: SampleParameters,
    nominal: Mapping[str, float],
) -> tuple[Indices, Array, dict[str, Array]]:
    """Return the arguments of simulators as arrays: phase codes, cells, and all parameters.

    Raises a CrystalError if a cell encloses no volume, or is not of its phase's lattice; a
    TypeError if a parameter has no nominal value: this simulator does not know it.
    """
    codes, cells = np.asarray(phase, dtype=np.intp), np.asarray(cells, dtype=np.float64)
    check_volume(cells)
    for code in np.unique(codes):
        phases[code].lattice.check_tied(cells[codes == code])
    unknown = parameters.keys() - nominal.keys()
    if unknown:
        raise TypeError(
            f"simulate() knows no parameter {', '.join(sorted(unknown))}; "
            f"it knows {', '.join(nominal)}"
        )
    values = {**nominal, **parameters}
    full = {name: np.full(len(cells), values[name], dtype=np.float64) for name in nominal}
    return codes, cells, full
