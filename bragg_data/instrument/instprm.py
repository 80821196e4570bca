"""A time-of-flight powder diffractometer, read from a GSAS-II ``.instprm`` file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Value = TypeVar("_Value", float, NDArray[np.float64])

_SHAPE = ("alpha", "beta-0", "beta-1", "beta-q", "sig-0", "sig-1", "sig-2", "sig-q", "X", "Y", "Z")

# Names in the file -> our attribute; those in _OPTIONAL may be absent and are then zero.
_KEYS = {
    "fltPath": "flight_path",
    "2-theta": "two_theta",
    "difC": "difc",
    "difA": "difa",
    "difB": "difb",
    "Zero": "tzero",
    **{name: name.lower().replace("-", "_") for name in _SHAPE},
}
_OPTIONAL = _KEYS.keys() - {"2-theta", "difC", "alpha"}
_LARGEST = 1e12  # of any value: far beyond every unit in use, far below where powers overflow
_HEADER = "#GSAS-II instrument parameter file; do not add/delete items!\n"


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
    text: str = ""

    @property
    def sha256(self) -> str:
        """SHA-256 of the text of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tof_from_d_spacing(self, d: _Value) -> _Value:
        """Return the time of flight in µs of a d-spacing in ångström (any shape)."""
        return self.difc * d + self.difa * d * d + self.difb / d + self.tzero

    def d_spacing_from_tof(self, tof: NDArray[np.float64]) -> NDArray[np.float64]:
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
        """A complete ``.instprm`` file: the original entries, with the values of this object."""
        lines = (line.partition(":") for line in self.text.splitlines() if not line.startswith("#"))
        entries = {key.strip(): value.strip() for key, colon, value in lines if colon}
        entries |= {"Type": "PNT", "Bank": f"{self.bank}"}
        entries |= {key: repr(float(getattr(self, name))) for key, name in _KEYS.items()}
        return _HEADER + "".join(f"{key}:{value}\n" for key, value in entries.items())

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
    def tof(self) -> NDArray[np.float64]:
        """The points of the grid in µs, shape (points,)."""
        return np.asarray(self.start * np.exp(self.relative_step * np.arange(self.points)))

    @property
    def stop(self) -> float:
        """The last point in µs."""
        return float(self.start * np.exp(self.relative_step * (self.points - 1)))


def read_instrument(instprm: Path | str, bank: int | None = None) -> Instrument:
    """Read one bank of a GSAS-II ``.instprm`` file, or of the text of one.

    The bank's number may be left out where the file holds one bank only. Raises an InstrumentError
    if the file cannot be read, is no time-of-flight (PNT) file, lacks a needed value, or does not
    hold the bank.
    """
    banks = read_instruments(instprm)
    where = str(instprm) if isinstance(instprm, Path) else "Instrument file"
    known = ", ".join(f"{b.bank} (2θ {b.two_theta:g}°)" for b in banks)
    chosen = [b for b in banks if bank in (None, b.bank)]
    if not chosen:
        raise InstrumentError(f"{where} holds no bank {bank}. It holds: {known}.")
    if len(chosen) > 1 and bank is None:
        raise InstrumentError(f"{where} holds the banks {known}: name one of them.")
    if len(chosen) > 1:
        raise InstrumentError(
            f"{where} holds several banks of the number {bank}: {known}. Renumber one of them."
        )
    return chosen[0]


def read_instruments(instprm: Path | str) -> tuple[Instrument, ...]:
    """Read all banks of a GSAS-II ``.instprm`` file, or of the text of one, in its order.

    Numbers may occur twice. Errors are those of :func:`read_instrument`.
    """
    where, text = "Instrument file", str(instprm)
    if isinstance(instprm, Path):
        where = text
        try:
            text = instprm.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise InstrumentError(
                f"Instrument file {instprm} not found. Give the path of a GSAS-II .instprm file."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InstrumentError(f"Instrument file {instprm} cannot be read: {error}.") from error
    sections: list[dict[str, str]] = []
    for stripped in map(str.strip, text.splitlines()):
        if stripped.startswith("#"):
            # "#Bank 4: GSAS-II instrument parameter file …" or "#GSAS-II instrument …"
            if "instrument parameter" in stripped:
                header = re.match(r"#\s*Bank\s+(\d+)\s*:", stripped)
                sections.append({"Bank": header[1]} if header else {})
            continue
        for entry in stripped.split(";"):
            key, colon, value = entry.partition(":")
            if colon:
                sections = sections or [{}]
                sections[-1][key.strip()] = value.strip()
    sections = [section for section in sections if section.keys() - {"Bank"}]
    if not sections:
        raise InstrumentError(
            f"{where} is no GSAS-II instrument parameter file: it has no 'key:value' lines."
        )
    return tuple(_instrument(s, number, where) for number, s in enumerate(sections, start=1))


def _instrument(section: Mapping[str, str], number: int, where: str) -> Instrument:
    kind, bank_text = section.get("Type", "PNT"), section.get("Bank", f"{number}")
    if not kind.startswith("PNT"):
        raise InstrumentError(
            f"{where} has an instrument of type {kind[:20]!r}; only PNT (neutron time of flight) "
            f"is simulated."
        )
    values: dict[str, float] = {}
    for key, attribute in _KEYS.items():
        if key not in section and key in _OPTIONAL:
            continue
        try:
            values[attribute] = float(section[key])
        except KeyError as error:
            raise InstrumentError(f"{where} lacks '{key}' (bank section {number}).") from error
        except ValueError as error:
            raise InstrumentError(
                f"{where} gives {section[key][:40]!r} for '{key}' where a number is needed."
            ) from error
    if not re.fullmatch(r"\d{1,9}(\.0*)?", bank_text):
        raise InstrumentError(
            f"{where} numbers a bank {bank_text[:20]!r}; a whole number is needed."
        )
    bank = int(float(bank_text))
    if not (all(abs(value) < _LARGEST for value in values.values()) and values["difc"] > 0):
        raise InstrumentError(
            f"{where}, bank {bank}: difC must be positive and every value a number below "
            f"{_LARGEST:g}."
        )
    if values["alpha"] <= 0:
        raise InstrumentError(f"{where}, bank {bank}: alpha (the rise) must be positive.")
    text = _HEADER + "".join(f"{key}:{value}\n" for key, value in section.items())
    return Instrument(bank=bank, text=text, **values)
