"""A time-of-flight powder diffractometer: calibration, geometry and peak shape of one bank."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from bragg_data.arrays import Array
from bragg_data.instrument import consistency

_Value = TypeVar("_Value", float, Array)

_SHAPE = ("alpha", "beta-0", "beta-1", "beta-q", "sig-0", "sig-1", "sig-2", "sig-q", "X", "Y", "Z")

# Names in a .instprm file -> our attribute; those in _OPTIONAL may be absent and are then zero.
KEYS = {
    "fltPath": "flight_path",
    "2-theta": "two_theta",
    "difC": "difc",
    "difA": "difa",
    "difB": "difb",
    "Zero": "tzero",
    **{name: name.lower().replace("-", "_") for name in _SHAPE},
}
_OPTIONAL = KEYS.keys() - {"2-theta", "difC", "alpha"}
_LARGEST = 1e12  # of any value: far beyond every unit in use, far below where powers overflow
_HEADER = "#GSAS-II instrument parameter file; do not add/delete items!\n"
NOTE = "# note: "  # before a warning, behind the entries, where GSAS-II does not read on
DIFC_PER_METRE = 505.557  # µs/Å: 2 m/h, so that difC is this times L |sin θ|
# Relative difference from which the geometry contradicts difC. Nominal ones of NOMAD, GEM, POWGEN,
# HIPD, HIPPO, SEPD, VULCAN, WISH and iMATERIA are up to 30 % off (at 14°); defaults 88 %.
_CONTRADICTION = 0.4
_PATHS = 3.0, 300.0  # m, of any diffractometer; HRPD has 95, HEIMDAL 165


class InstrumentError(ValueError):
    """An instrument file that cannot be read, or a bank that is not in it."""


@dataclass(frozen=True)
class Instrument:
    """Calibration and peak shape of one bank of a time-of-flight diffractometer.

    The names are GSAS-II's. d in ångström, T in µs:

    * position  T = difc·d + difa·d² + difb/d + tzero;
    * rise alpha/d, decay beta_0 + beta_1/d⁴ + beta_q/d², in 1/µs;
    * Gaussian variance sig_0 + sig_1 d² + sig_2 d⁴ + sig_q d, in µs²;
    * Lorentzian full width x·d + y·d² + z, in µs.

    The angle 2θ, in degrees, may be negative: the sign is the side of the beam.
    """

    bank: int
    two_theta: float
    difc: float
    difa: float = 0.0
    difb: float = 0.0
    tzero: float = 0.0
    alpha: float = 1.0
    beta_0: float = 0.0
    beta_1: float = 0.0
    beta_q: float = 0.0
    sig_0: float = 0.0
    sig_1: float = 0.0
    sig_2: float = 0.0
    sig_q: float = 0.0
    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    flight_path: float = 0.0
    # Of Ikeda & Carpenter, in place of rise and decay: α₀ in µs, α₁ in µs/Å, β₀ in µs, κ.
    moderator: tuple[float, float, float, float] | None = None
    text: str = ""
    # What was assumed, left out or approximated in reading, in sentences.
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of the text of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def flight_path_of_difc(self) -> float:
        """The total flight path in m that difC and 2θ imply; infinite at 2θ = 0."""
        sine = abs(math.sin(math.radians(self.two_theta / 2)))
        return self.difc / (DIFC_PER_METRE * sine) if sine else math.inf

    @property
    def geometry_doubt(self) -> str:
        """Why 2θ or the flight path cannot be right, in a sentence; empty where they can be.

        difC = (2 m/h) L |sin θ| = 505.557 L |sin θ|, with the total flight path L in m. Where the
        file gives none, L has to be that of some diffractometer.
        """
        if self.flight_path <= 0:
            path = self.flight_path_of_difc
            if _PATHS[0] <= path <= _PATHS[1]:
                return ""
            return (
                f"Bank {self.bank} of the instrument file: 2θ {self.two_theta:g}° and difC "
                f"{self.difc:.1f} give a flight path of {path:.1f} m, which no diffractometer has. "
                f"The angle is a default or wrong; lengths depend on difC alone."
            )
        expected = self.difc * self.flight_path / self.flight_path_of_difc
        if abs(self.difc - expected) <= _CONTRADICTION * expected:
            return ""
        return (
            f"Bank {self.bank} of the instrument file: 2θ {self.two_theta:g}° and the flight path "
            f"{self.flight_path:g} m give difC {expected:.1f}, and the file's is {self.difc:.1f}. "
            f"Angle or flight path are defaults or wrong; lengths depend on difC alone."
        )

    def tof_from_d_spacing(self, d: _Value) -> _Value:
        """Return the time of flight in µs of a d-spacing in ångström (any shape)."""
        return self.difc * d + self.difa * d * d + self.difb / d + self.tzero

    def d_spacing_from_tof(self, tof: Array) -> Array:
        """Return the d-spacing in ångström of a time of flight in µs (any shape).

        Newton's method on :meth:`tof_from_d_spacing`; the terms other than difc are small, so it
        converges in a few steps. An InstrumentError is raised where T has no d, that is at or below
        tzero, or outside the range in which T grows with d.
        """
        tof = np.asarray(tof, dtype=np.float64)
        with np.errstate(all="ignore"):
            d = (tof - self.tzero) / self.difc
            for _ in range(60):
                slope = self.difc + 2 * self.difa * d - self.difb / (d * d)
                step = (self.tof_from_d_spacing(d) - tof) / slope
                d = d - step
            # Newton may have left for a root on the falling branch: check the result.
            slope = self.difc + 2 * self.difa * d - self.difb / (d * d)
            good = (d > 0) & (slope > 0) & (np.abs(self.tof_from_d_spacing(d) - tof) < 1e-6 * tof)
        if not np.all(good):
            first = np.atleast_1d(tof)[~np.atleast_1d(good)][0]
            raise InstrumentError(
                f"Time of flight {first:g} µs corresponds to no d-spacing on bank {self.bank} "
                f"(difC {self.difc:g}, difA {self.difa:g}, Zero {self.tzero:g})."
            )
        return np.asarray(d)

    @property
    def instprm(self) -> str:
        """A complete ``.instprm`` file: the original entries, with the values of this object.

        Raises an InstrumentError of a moderator, which the format does not have.
        """
        if self.moderator is not None:
            raise InstrumentError(
                f"Bank {self.bank} has a pulse of Ikeda & Carpenter, which no .instprm file has."
            )
        lines = (line.partition(":") for line in self.text.splitlines() if not line.startswith("#"))
        entries = {key.strip(): value.strip() for key, colon, value in lines if colon}
        entries |= {"Type": "PNT", "Bank": f"{self.bank}"}
        entries |= {key: repr(float(getattr(self, name))) for key, name in KEYS.items()}
        return _text_of(entries)

    @property
    def section(self) -> str:
        """The section of this bank in a ``.instprm`` file of several, with its warnings."""
        heading = _HEADER.replace("#", f"#Bank {self.bank}: ")
        return self.instprm.replace(_HEADER, heading) + _lines_of(self.warnings)

    def with_parameters(self, **changes: float) -> Instrument:
        """Return a copy with other values for the named parameters."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TofGrid:
    """A logarithmic time-of-flight grid, T_i = start · exp(relative_step · i), in µs."""

    start: float
    relative_step: float
    points: int

    @property
    def tof(self) -> Array:
        """The points of the grid in µs, shape (points,)."""
        return np.asarray(self.start * np.exp(self.relative_step * np.arange(self.points)))

    @property
    def stop(self) -> float:
        """The last point in µs."""
        return float(self.start * np.exp(self.relative_step * (self.points - 1)))


ANGLE_TOLERANCE = 5.0  # degrees between the angles of two banks that count as the same


def angles_apart(first: float, second: float) -> float:
    """Return how far two scattering angles are apart, in degrees, on either side of the beam."""
    return abs(abs(first) - abs(second))


def instrument_of_entries(
    entries: Mapping[str, str], number: int, where: str, warnings: Sequence[str] = ()
) -> Instrument:
    """Return the bank of the entries of a ``.instprm`` section, the ``number``-th of a file.

    ``warnings`` are those of reading, which become part of the text. Raises an InstrumentError,
    which names the file as ``where``, if the section is of no time-of-flight instrument, lacks a
    needed value, or has one that cannot be.
    """
    kind, bank_text = entries.get("Type", "PNT"), entries.get("Bank", f"{number}")
    if kind[:3] in ("PNC", "PXC"):
        raise InstrumentError(
            f"{where} is {kind[:20]!r}: constant wavelength; only time of flight is supported."
        )
    if not kind.startswith("PNT"):
        raise InstrumentError(
            f"{where} has an instrument of type {kind[:20]!r}; only PNT (neutron TOF) is simulated."
        )
    values: dict[str, float] = {}
    for key, attribute in KEYS.items():
        if key not in entries and key in _OPTIONAL:
            continue
        try:
            # float() takes 1_0 for 10.
            values[attribute] = float(entries[key].replace("_", "?"))
        except KeyError as error:
            raise InstrumentError(f"{where} lacks '{key}' (bank section {number}).") from error
        except ValueError as error:
            raise InstrumentError(
                f"{where} gives {entries[key][:40]!r} for '{key}' where a number is needed."
            ) from error
    if not re.fullmatch(r"\d{1,9}(\.0*)?", bank_text):
        raise InstrumentError(f"{where} numbers a bank {bank_text[:20]!r}; give a whole number.")
    bank = int(float(bank_text))
    if not (all(abs(value) < _LARGEST for value in values.values()) and values["difc"] > 0):
        raise InstrumentError(
            f"{where}, bank {bank}: difC must be positive, all values numbers below {_LARGEST:g}."
        )
    if values["alpha"] <= 0:
        raise InstrumentError(f"{where}, bank {bank}: alpha (the rise) must be positive.")
    text = _text_of(entries) + _lines_of(warnings)
    instrument = Instrument(
        bank=bank, moderator=None, text=text, warnings=tuple(warnings), **values
    )
    # Not in the text, by whose digest campaigns know the instrument.
    doubts = consistency.doubts_of_constants(
        bank, {name: getattr(instrument, name) for name in KEYS.values()}
    )
    return replace(instrument, warnings=tuple(dict.fromkeys([*warnings, *doubts])))


def _text_of(entries: Mapping[str, str]) -> str:
    return _HEADER + "".join(f"{key}:{value}\n" for key, value in entries.items())


def _lines_of(warnings: Sequence[str]) -> str:
    return "".join(f"{NOTE}{warning}\n" for warning in warnings)
