"""What in the constants of a bank cannot be, or is missing, in sentences."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace

import numpy as np

# Keys that are read elsewhere, or that GSAS-II has and time of flight does not need.
_OTHER_KEYS = frozenset(
    {"Type", "Bank", "Azimuth", "Source", "InstrName", "Probe", "Lam", "SH/L", "Polariz.", "pdabc"}
    | {"U", "V", "W", "difa-fixed", "Probability"}
)
_NUMBERS = "Azimuth", "Lam", "U", "V", "W"  # of those, and nothing is computed from them
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
_EXTRA = 0.1  # share of difC·d that the other terms of a position do not reach
_WAVELENGTHS = 0.5, 5.0  # Å


def doubts_of_entries(
    entries: Mapping[str, str], keys: Mapping[str, str], of_file: Iterable[str], number: str
) -> Iterator[str]:
    """Yield which entries of a section are unknown, missing or distorted.

    ``keys`` are those that are read, and ``of_file`` those of all sections.
    """
    unknown = [key for key in entries if key not in keys and key not in _OTHER_KEYS]
    if unknown:
        yield f"bank {number} has the unknown entry '{unknown[0][:20]}', which was not read."
    missing = [key for key in keys if key not in entries and key != "Z"]  # Z is of 2019
    if missing:
        yield f"bank {number} lacks {', '.join(missing)}: zero is used."
    known = {*keys, *_OTHER_KEYS} - {*entries, *missing, "pdabc"}
    if elsewhere := [key for key in of_file if key in known]:
        names = ", ".join(elsewhere)[:40]
        yield f"bank {number} lacks {names}, which other banks of the file have."
    distorted = [key for key in _NUMBERS if key in entries and not _NUMBER.match(entries[key])]
    if distorted:
        yield f"bank {number} has no number as {', '.join(distorted)}: the file may be damaged."


def doubts_of_constants(number: int, constants: Mapping[str, float]) -> Iterator[str]:
    """Yield what cannot be of widths and positions, at d that wavelengths of 0.5 to 5 Å reach.

    ``constants`` are those of bank ``number``, by the names of an Instrument's fields.
    """
    bank, i = f"bank {number}", SimpleNamespace(**constants)
    if not 0 < abs(i.two_theta) <= 180 or i.flight_path < 0:
        yield (
            f"2θ {i.two_theta:g}° and a flight path of {i.flight_path:g} m of {bank} are no "
            f"geometry of a diffractometer."
        )
    sine = abs(math.sin(math.radians(i.two_theta / 2)))
    d = np.geomspace(*_WAVELENGTHS, 25) / (2 * max(sine, 0.02))
    widths = {
        "The variance": i.sig_0 + i.sig_1 * d**2 + i.sig_2 * d**4 + i.sig_q * d,
        "The decay": i.beta_0 + i.beta_1 / d**4 + i.beta_q / d**2,
        "The Lorentzian width": i.x * d + i.y * d**2 + i.z,
    }
    for name, values in widths.items():
        if values.min() < 0:
            yield f"{name} of {bank} is negative at d = {d[int(values.argmin())]:.3g} Å."
    terms = np.abs(i.difa * d**2 + i.difb / d + i.tzero) / (i.difc * d)
    if terms.max() > _EXTRA:
        yield (
            f"difA, difB and Zero of {bank} shift positions by {100 * terms.max():.0f} % at d = "
            f"{d[int(terms.argmax())]:.3g} Å, where a few per cent are usual."
        )
