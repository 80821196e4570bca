"""Positions of TOPAS: t0, t1 and t2 of the time-of-flight datasets in an ``.inp`` file.

``TOF_x_axis_calibration(t0, value, t1, value, t2, value)`` places reflections at t0 + t1 d + t2 d²
(TOPAS Technical Reference, macros of time of flight), which are Zero, difC and difA. Peak shapes
are convolutions of the user's choice; they and the angle come from another file.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from bragg_data.instrument.conversion import OriginalBank, peaks_of, with_warnings
from bragg_data.instrument.diffractometer import InstrumentError

_COMMENTS = re.compile(r"/\*.*?\*/|'[^\n]*", re.DOTALL)
_MACRO = re.compile(r"(?<!macro )\bTOF_x_axis_calibration\s*\(([^)]*)\)")
_VALUE = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"\s*({_VALUE})(?:[`_].*)?\s*", re.DOTALL)  # 22580.1`_0.02_LIMIT_MAX_1e5
_CONSTANT = re.compile(
    rf"^[ \t]*(?:(?:prm|local)[ \t]+)?[!@]?[ \t]*t([012])(?:[ \t]*[=:,][ \t]*|[ \t]+)({_VALUE})",
    re.MULTILINE,
)
_SAME_BANK = 0.05  # relative difference of difC up to which a bank is the same


class Positions(NamedTuple):
    """T = t0 + t1 d + t2 d², in µs and Å."""

    t0: float
    t1: float
    t2: float


def recognised(text: str) -> bool:
    """Return whether a text is of TOPAS: with the macro of positions, or their constants alone."""
    text = _COMMENTS.sub(" ", text)
    return bool(_MACRO.search(text)) or {"0", "1"} <= {name for name, _ in _CONSTANT.findall(text)}


def read_topas_positions(text: str, where: str) -> list[Positions]:
    """Read the positions of each dataset; raises an InstrumentError if one is no number."""
    text = _COMMENTS.sub(" ", text)
    result: list[Positions] = []
    for arguments in _MACRO.findall(text):
        values = [_NUMBER.fullmatch(a) for a in arguments.split(",")[1::2]]
        if len(values) != 3 or not all(values):
            raise InstrumentError(
                f"{where}: TOF_x_axis_calibration({' '.join(arguments.split())[:60]}) needs three "
                f"names, each with a number (t0, 1.2, t1, 22580.1, t2, -0.5)."
            )
        result.append(Positions(*(float(v[1]) for v in values if v)))
    if not result:
        constants = _CONSTANT.findall(text)
        by_name = dict(constants)
        if len(by_name) != len(constants):
            raise InstrumentError(f"{where} gives t0, t1 or t2 several times: keep one bank.")
        result = [Positions(*(float(by_name.get(n, 0.0)) for n in "012"))]
    for p in result:
        if not p.t1 > 0:
            raise InstrumentError(f"{where}: t1 is {p.t1:g} µs/Å, and must be positive (difC).")
    return result


def without_widths(text: str, where: str) -> InstrumentError:
    """Return the error for a file of TOPAS to which no other gives the peak widths."""
    constants = "; ".join(
        f"difC {p.t1:g}, difA {p.t2:g}, Zero {p.t0:g}" for p in read_topas_positions(text, where)
    )
    return InstrumentError(
        f"{where} is of TOPAS and gives positions ({constants}), but neither 2θ nor peak widths "
        f"that could be converted. Take these from another file of the instrument: bragg "
        f"instrument convert FILE --widths OTHER.instprm --out X.instprm."
    )


def banks_with_positions(
    text: str, where: str, banks: Sequence[OriginalBank], origin: str
) -> list[OriginalBank]:
    """Return banks with the positions of TOPAS, each of the bank whose difC is the nearest.

    ``origin`` names the file of the banks. Raises an InstrumentError if no difC is near, or two
    datasets have the same bank.
    """
    result: list[OriginalBank] = []
    for p in read_topas_positions(text, where):
        bank = min(banks, key=lambda b: abs(b.instrument.difc / p.t1 - 1))
        i, apart = bank.instrument, abs(bank.instrument.difc / p.t1 - 1)
        if apart > _SAME_BANK:
            known = ", ".join(f"{b.instrument.difc:g}" for b in banks)
            raise InstrumentError(
                f"{where}: t1 is {p.t1:g}, and no bank of {origin} has a difC within "
                f"{100 * _SAME_BANK:g} % of it (it has {known}). Give the file of this instrument."
            )
        if any(i.bank == b.instrument.bank for b in result):
            raise InstrumentError(
                f"{where}: two datasets have a t1 near the difC of bank {i.bank} of {origin}. "
                f"Convert them one by one."
            )
        moved = i.with_parameters(tzero=p.t0, difc=p.t1, difa=p.t2, difb=0.0)
        warning = (
            f"bank {i.bank}: positions are those of TOPAS (t0 {p.t0:g}, t1 {p.t1:g}, t2 {p.t2:g}); "
            f"2θ and peak shape are those of {origin}, whose difC is {100 * apart:.2f} % off."
        )
        original = OriginalBank(moved, peaks_of(moved), bank.d)
        result.append(with_warnings(original, (*i.warnings, warning)))
    return result
