"""The phases of a campaign to be designed, and the ranges of their cells."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.campaign_design.options import DesignError
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem, encloses_volume
from bragg_data.crystallography.cif import file_and_block, read_text, structure_names
from bragg_data.crystallography.structure import Phase, phase_from_cif

_PERCENT = 2.0  # of each length, by default
_DEGREES = 1.0  # about each angle, by default
_FLATTEST = 0.5  # degrees that a rhombohedral alpha keeps below 120
_DIGITS = 4  # decimals of the ends of a range
_WIDEST = 50.0  # per cent, or degrees
_LARGEST = 1000.0  # Å, or degrees
_RANGE = re.compile(
    r"(?:(?P<phase>[A-Za-z0-9_.-]+):)?(?:(?P<parameter>[a-z]+)=)?"
    r"(?:(?P<percent>[0-9.]+)%|(?P<degrees>[0-9.]+)deg|(?P<low>[0-9.]+):(?P<high>[0-9.]+))"
)
_SYNTAX = "write 3% (of all lengths), 2deg (of all angles), a=3.9:4.1, or PHASE:a=3.9:4.1"


@dataclass(frozen=True, eq=False)
class PhaseRanges:
    """A phase, where it comes from, and the ranges of its free cell parameters."""

    phase: Phase
    cif: Path
    block: str | None
    low: Array  # (n_free,) in Å and degrees
    high: Array
    notes: tuple[str, ...] = field(default=())  # why a range is another than it was meant to be

    @property
    def cells(self) -> Array:
        """The cell of the CIF, and those at the corners of the ranges, (1 + 2**n_free, 6)."""
        corners = list(itertools.product(*zip(self.low, self.high, strict=True)))
        return np.concatenate([self.phase.cell[None], self.phase.lattice.cells(corners)])

    @property
    def exclude(self) -> tuple[str, ...]:
        """Rules for cells of a higher crystal system, which a draw may hit within 1e-6."""
        ends = dict(
            zip(
                self.phase.lattice.free_parameters,
                zip(self.low, self.high, strict=True),
                strict=True,
            )
        )
        if self.phase.crystal_system is CrystalSystem.tetragonal:
            (a_low, a_high), (c_low, c_high) = ends["a"], ends["c"]
            return ("a = c",) if a_low <= c_high and c_low <= a_high else ()
        if tuple(ends) == ("a", "alpha") and ends["alpha"][0] <= 90.0 <= ends["alpha"][1]:
            return ("alpha = 90",)
        return ()


def phases_of(cifs: Sequence[str]) -> list[PhaseRanges]:
    """Read the phases of ``FILE.cif`` or ``FILE.cif:BLOCK``, with the default ranges.

    Raises a DesignError if there is none or a file holds several structures and no block is named,
    and a CrystalError if a file cannot be read as a structure.
    """
    if not cifs:
        raise DesignError("A campaign needs a structure: give one with --cif FILE.cif.")
    names: list[str] = []
    phases = []
    for text in cifs:
        path, block = file_and_block(text)
        content = read_text(path)
        known = structure_names(content, str(path))
        if block is None and len(known) > 1:
            raise DesignError(
                f"{path} holds {len(known)} structures: name a data block, as in "
                f"--cif {path}:{known[0]}. It has: {', '.join(known)}."
            )
        name = _name(path.stem if block is None else block, names)
        names.append(name)
        phase = phase_from_cif(content, name, block, str(path))
        free = phase.cell[phase.lattice.free_columns]
        is_length = np.array([n in "abc" for n in phase.lattice.free_parameters])
        half = np.where(is_length, free * _PERCENT / 100, _DEGREES)
        phases.append(PhaseRanges(phase, path, block, free - half, free + half))
    return phases


def _name(text: str, taken: Sequence[str]) -> str:
    """Return a valid name of a phase that is not taken."""
    base = ascii_name(text) or "phase"
    lower = {name.lower() for name in taken}
    names = itertools.chain([base], (f"{base}-{k}" for k in itertools.count(2)))
    return next(name for name in names if name.lower() not in lower)


def ascii_name(text: str) -> str:
    """Return a text as letters, digits, ``_``, ``.`` and ``-`` alone, at most 60; maybe empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-.")[:60]


def _is_length(phase: PhaseRanges) -> Mask:
    return np.array([name in "abc" for name in phase.phase.lattice.free_parameters])


def with_ranges(phases: Sequence[PhaseRanges], texts: Sequence[str]) -> list[PhaseRanges]:
    """Return phases with requested ranges, the last of which counts, clipped to cells with volume.

    Raises a DesignError for a text that cannot be read, an unknown phase, a parameter that is free
    in no phase, and a range whose cells all enclose no volume.
    """
    changed = list(phases)
    for text in texts:
        match = _RANGE.fullmatch(text.replace(" ", ""))
        if match is None or (match["low"] and not match["parameter"]):
            raise DesignError(f"The range '{text}' cannot be read: {_SYNTAX}.")
        name, known = match["phase"], [p.phase.name for p in phases]
        if name is not None and name not in known:
            raise DesignError(f"The range '{text}' is of no phase: there are {', '.join(known)}.")
        concerned = [k for k, phase in enumerate(known) if name in (None, phase)]
        after = [_changed(changed[k], match) for k in concerned]
        if not any(after):
            free = "; ".join(
                f"{', '.join(phases[k].phase.lattice.free_parameters)} in '{known[k]}'"
                for k in concerned
            )
            raise DesignError(f"The range '{text}' is of no free parameter: free are {free}.")
        for k, phase in zip(concerned, after, strict=True):
            changed[k] = phase or changed[k]
    return [_clipped(phase) for phase in changed]


def _changed(phase: PhaseRanges, match: "re.Match[str]") -> PhaseRanges | None:
    """Return a phase with the range of a text, or None if it has no such parameter."""
    names, is_length = phase.phase.lattice.free_parameters, _is_length(phase)
    selected = np.array([match["parameter"] in (None, name) for name in names])
    free = phase.phase.cell[phase.phase.lattice.free_columns]
    if match["percent"]:
        percent = _number(match, "percent", _WIDEST)
        selected &= is_length
        low, high = free * (1 - percent / 100), free * (1 + percent / 100)
    elif match["degrees"]:
        degrees = _number(match, "degrees", _WIDEST)
        selected &= ~is_length
        low, high = free - degrees, free + degrees
    else:
        ends = _number(match, "low", _LARGEST), _number(match, "high", _LARGEST)
        if ends[0] >= ends[1]:
            raise DesignError(f"The range '{match[0]}' ends before it begins.")
        low, high = np.full(len(names), ends[0]), np.full(len(names), ends[1])
    if not selected.any():
        return None
    low, high = np.where(selected, low, phase.low), np.where(selected, high, phase.high)
    return replace(phase, low=low, high=high)


def _number(match: "re.Match[str]", group: str, largest: float) -> float:
    try:
        value = float(match[group])
    except ValueError as error:
        raise DesignError(f"The range '{match[0]}' cannot be read: {_SYNTAX}.") from error
    if not 0 < value <= largest:
        raise DesignError(
            f"The range '{match[0]}' has {value:g}: give a number above 0, at most {largest:g}."
        )
    return value


def _clipped(phase: PhaseRanges) -> PhaseRanges:
    """Return a phase with ranges all of whose cells enclose volume, rounded, and notes."""
    p, lattice = phase.phase, phase.phase.lattice
    low, high, notes = np.round(phase.low, _DIGITS), np.round(phase.high, _DIGITS), []
    free, angle = p.cell[lattice.free_columns], ~_is_length(phase)
    if lattice.free_parameters == ("a", "alpha") and high[1] > 120 - _FLATTEST:
        notes.append(f"Phase '{p.name}': alpha ends at {120 - _FLATTEST:g}°, below 120°.")
        high[1] = 120 - _FLATTEST
    centre = np.clip(free, low, high)
    share = 1.0
    for _ in range(200):
        # The limits of angles are linear: where all corners are inside, everything is.
        if (low <= high).all() and encloses_volume(replace(phase, low=low, high=high).cells).all():
            break
        share *= 0.95
        low = np.where(angle, np.round(centre - share * (centre - low), _DIGITS), low)
        high = np.where(angle, np.round(centre + share * (high - centre), _DIGITS), high)
    else:
        raise DesignError(f"Phase '{p.name}': cells of the requested ranges enclose no volume.")
    if share < 1:
        notes.append(
            f"Phase '{p.name}': ranges of angles were narrowed, so that all cells enclose volume."
        )
    for name, value, *ends in zip(lattice.free_parameters, free, low, high, strict=True):
        if not ends[0] <= value <= ends[1]:
            notes.append(
                f"Phase '{p.name}': the range of {name}, {ends[0]:g} to {ends[1]:g}, does not "
                f"contain the CIF's {value:g}."
            )
    return replace(phase, low=low, high=high, notes=tuple(notes))


def ranges_text(phase: PhaseRanges) -> str:
    """Return the ranges of a phase in words: a 3.92 to 4.08 Å, alpha 89 to 91°."""
    names = phase.phase.lattice.free_parameters
    return ", ".join(
        f"{name} {low:g} to {high:g}{' Å' if name in CELL_PARAMETERS[:3] else '°'}"
        for name, low, high in zip(names, phase.low, phase.high, strict=True)
    )
