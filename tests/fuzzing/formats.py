"""The formats: originals, how each is read, and how strictly."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.cif import read_text
from bragg_data.crystallography.structure import phase_from_cif
from bragg_data.instrument.instprm import InstrumentError, read_instruments
from bragg_data.measurement.readers import ProfileError, read_profiles
from tests.bragg_data.instrument import test_fullprof as fullprof
from tests.bragg_data.instrument.test_gsas_iparm import PSEUDO_VOIGT, prm, records
from tests.fuzzing import strict_instruments, strict_profiles, strict_structures
from tests.fuzzing.originals import INSTPRM, PROFILES, structures

Numbers = Sequence[object]  # of banks or phases: tuples of texts, numbers, arrays and None


def same(first: object, second: object) -> bool:
    """Return whether numbers are equal but for rounding; None is equal to all."""
    if first is None or second is None:
        return True
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, (float, int, np.ndarray)):
        a, b = np.asarray(first), np.asarray(second)
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-12))
    return first == second


@dataclass
class Format:
    """A format of files."""

    name: str
    suffix: str
    originals: list[bytes]
    read: Callable[[Path], tuple[Numbers, Sequence[str]]]
    error: type[Exception]
    strict: Callable[[bytes], Numbers | None]
    numbers: list[Numbers] = field(init=False)  # of the originals
    messages: set[str] = field(init=False)  # that the originals cause

    def __post_init__(self) -> None:
        """Read the originals, which the strict parser has to accept."""
        self.numbers, self.messages = [], set()
        path = Path(tempfile.mkdtemp()) / f"original{self.suffix}"
        for content in self.originals:
            path.write_bytes(content)
            self.messages |= set(self.read(path)[1])
            numbers = self.strict(content)
            assert numbers is not None, self.name
            self.numbers.append(numbers)


def _read_profiles(path: Path) -> tuple[Numbers, Sequence[str]]:
    banks = read_profiles(path)
    numbers = [(p.bank, p.two_theta, p.difc, p.unit, p.tof, p.intensity, p.sigma) for p in banks]
    return numbers, [text for p in banks for text in p.warnings]


def _strict_profiles(content: bytes, kind: str) -> Numbers | None:
    banks = strict_profiles.profiles(content, kind)
    if banks is None:
        return None
    return [(b.bank, b.two_theta, b.difc, "us", b.x, b.y, b.sigma) for b in banks]


def _profile(kind: str) -> Format:
    return Format(
        kind,
        f".{kind}",
        [PROFILES[kind].encode()],
        _read_profiles,
        ProfileError,
        partial(_strict_profiles, kind=kind),
    )


def _read_structure(path: Path) -> tuple[Numbers, Sequence[str]]:
    phase = phase_from_cif(read_text(path), "phase", where=str(path))
    atoms = (phase.symbols, phase.positions, phase.occupancies, phase.u_iso)
    return (phase.space_group, phase.cell, *atoms), phase.assumptions


def _structure() -> Format:
    originals = [text.encode() for text in structures()]
    strict = strict_structures.structure
    return Format("cif", ".cif", originals, _read_structure, CrystalError, strict)


def _read_instrument(path: Path) -> tuple[Numbers, Sequence[str]]:
    banks = read_instruments(path)
    doubts = [bank.geometry_doubt for bank in banks if bank.geometry_doubt]
    numbers = [tuple(getattr(bank, name) for name in strict_instruments.FIELDS) for bank in banks]
    return numbers, [*doubts, *(text for bank in banks for text in bank.warnings)]


def _strict_like(
    content: bytes, canonical: Callable[[bytes], str | None], path: Path
) -> Numbers | None:
    """Return the numbers of the canonical text of an original with other numbers."""
    text = canonical(content)
    if text is None:
        return None
    path.write_text(text)
    try:
        numbers, _ = _read_instrument(path)
    except InstrumentError:
        return None
    return numbers if all(map(strict_instruments.plausible, numbers)) else None


def _instrument(name: str) -> Format:
    suffix, text, columns = INSTRUMENTS[name]
    strict: Callable[[bytes], Numbers | None] = strict_instruments.instprm
    if name != "instprm":
        path = Path(tempfile.gettempdir()) / f"canonical{suffix}"
        canonical = strict_instruments.like(text, columns, unordered=name != "pcr")
        strict = partial(_strict_like, canonical=canonical, path=path)
    return Format(name, suffix, [text.encode()], _read_instrument, InstrumentError, strict)


INSTRUMENTS = {  # suffix, text, characters that name a record
    "instprm": (".instprm", INSTPRM, 0),
    "gsas prm": (
        ".prm",
        prm(*(records(number, 3, (*PSEUDO_VOIGT, *[0.0] * 12)) for number in (1, 2)))
        .replace(" 5000.25", " 1983.10")
        .replace("10000.50", " 3664.20"),
        12,
    ),
    "irf": (".irf", fullprof.HEAD.format(nprof=9) + fullprof.COEFFICIENTS.format(alph0=0.0), 0),
    "pcr": (".pcr", fullprof.pcr(), 0),
}

FORMATS: dict[str, Callable[[], Format]] = {
    **{kind: partial(_profile, kind) for kind in PROFILES},
    **{name: partial(_instrument, name) for name in INSTRUMENTS},
    "cif": _structure,
}
