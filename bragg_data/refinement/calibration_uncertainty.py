r"""How well the calibration of a bank is known: the part of an uncertainty that no counting shows.

An error of difC is the same relative error of every length. It has a part of the flight path and
of the times, and one of the angle, :math:`\delta d/d = \cot\theta\,\delta\theta`, so that banks at
small angles are known worse. Where the calibration's own uncertainty is not stated, these are
defaults for each kind of calibration. Those of ``other`` were chosen on banks of diffractometers
with certified or published cells (docs/measured.md), from which they deviate by as much.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from bragg_data.instrument.diffractometer import DIFC_PER_METRE
from bragg_data.refinement.calibrate import stated_su
from bragg_data.refinement.measured_bank import MeasuredBank


class CalibrationKind(StrEnum):
    """Where the calibration of a measurement comes from."""

    SAME = "same"
    """A standard measured in the same cycle, or the user says so."""
    OTHER = "other"
    """An instrument file of another cycle, or of one that is not known."""
    HEADER = "header"
    """The geometry in the header of the profile alone."""


class _Default(NamedTuple):
    of_path: float  # relative
    of_angle: float  # radians
    text: str


_DEFAULTS = {
    CalibrationKind.SAME: _Default(1e-4, 1e-4, "a calibration of the same cycle"),
    CalibrationKind.OTHER: _Default(3e-4, 8e-4, "an instrument file of an unknown cycle"),
    CalibrationKind.HEADER: _Default(2e-3, 2e-3, "the header's geometry"),
}


def calibration_su(bank: MeasuredBank, kind: CalibrationKind) -> float:
    """Return the relative standard uncertainty of every length by the calibration of a bank.

    Half a bin, as a limit of a uniform distribution (over √3), is added where the file does not
    show whether its times are edges or centres.
    """
    stated = stated_su(bank.instrument)
    if stated is not None:
        return float(np.sqrt(stated**2 + bank.half_bin**2 / 3))
    default = _DEFAULTS[kind]
    instrument = bank.instrument
    sine = bank.sin_theta
    if instrument.geometry_doubt and instrument.flight_path > 0:  # the path is usually right
        sine = min(instrument.difc / (DIFC_PER_METRE * instrument.flight_path), 1.0)
    of_angle = default.of_angle * float(np.sqrt(1 - sine**2)) / max(sine, 1e-2)
    return float(np.sqrt(default.of_path**2 + of_angle**2 + bank.half_bin**2 / 3))


def explanation(bank: MeasuredBank, kind: CalibrationKind) -> str:
    """Return a sentence on the uncertainty by the calibration of a bank."""
    stated = stated_su(bank.instrument)
    origin = _DEFAULTS[kind].text if stated is None else "a calibration on a standard"
    half = ", and half a bin, which the file leaves open" if bank.half_bin else ""
    return (
        f"Calibration of {bank.label}: {origin}{half}; every length is known to "
        f"{1e4 * calibration_su(bank, kind):.1f}e-4."
    )
