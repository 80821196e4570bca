"""What may differ from sample to sample besides its cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray


class SampleParameters(TypedDict, total=False):
    """Keyword arguments of simulators: each a number or of shape (n,), nominal where left out.

    Attributes
    ----------
    u_scale
        Factor on the displacement parameters of the phase.
    size, microstrain
        Isotropic Lorentzian broadening in µm and 1e-6.
    tzero, difc
        Calibration of the measurement, in µs and µs/Å.
    width_scale
        Factor on the widths of all peaks; the fast simulator alone has it.
    """

    u_scale: ArrayLike
    size: ArrayLike
    microstrain: ArrayLike
    tzero: ArrayLike
    difc: ArrayLike
    width_scale: ArrayLike


def parameters_per_sample(
    parameters: SampleParameters, nominal: Mapping[str, float], n: int
) -> dict[str, NDArray[np.float64]]:
    """Return an array of shape (n,) of each parameter that has a nominal value.

    Raises
    ------
    TypeError
        If a parameter has no nominal value: this simulator does not know it.
    """
    unknown = parameters.keys() - nominal.keys()
    if unknown:
        raise TypeError(
            f"simulate() knows no parameter {', '.join(sorted(unknown))}; "
            f"it knows {', '.join(nominal)}"
        )
    values = {**nominal, **parameters}
    return {name: np.full(n, values[name], dtype=np.float64) for name in nominal}
