"""A campaign file (TOML): phases, instrument and grid, and the ordered list of samples."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bragg_data.arrays import Array, Integers, Integers8
from bragg_data.campaign_file import (
    MOST_BYTES,
    CampaignFile,
    MeasurementEffects,
    parse_campaign_file,
)
from bragg_data.campaign_file import CampaignError as CampaignError
from bragg_data.crystallography.cell import (
    CELL_PARAMETERS,
    CrystalError,
    CrystalSystem,
    check_volume,
)
from bragg_data.crystallography.structure import Phase, phase_from_cif, read_phase
from bragg_data.errors import first_line
from bragg_data.files import read_bounded
from bragg_data.growth import Growth, growths_of
from bragg_data.instrument.instprm import Instrument, InstrumentError, TofGrid, read_instrument
from bragg_data.sampling import cells_of_phase

BUILT_IN = Path(__file__).parent / "campaigns"
"""Directory of the campaigns that ship with the project."""

_MOST_CELLS_BYTES = 50_000_000  # of a list of cells: about a million

# Of a campaign's definition: everything else decides what the pattern of a cell is.
_OF_THE_DRAW = {"name", "seed", "sampling", "phases", "cell", "exclude", "samples", "growth"}
_GROWTH = 1000  # spawn key of candidates; those of phases are 0 to 127


@dataclass(frozen=True)
class Samples:
    """The labels of the samples of a campaign."""

    phase: Integers8  # (n,) codes: indices of the campaign's phases
    crystal_system: Integers8  # (n,) codes of CrystalSystem
    cells: Array  # (n, 6) a, b, c in ångström; alpha, beta, gamma in degrees
    # Of a whole data set that has grown: how many the campaign drew. Splits are those of these.
    n_drawn: int | None = None

    def __len__(self) -> int:
        return len(self.phase)

    def __getitem__(self, rows: slice | Integers) -> "Samples":
        return Samples(self.phase[rows], self.crystal_system[rows], self.cells[rows])


@dataclass(frozen=True)
class Campaign:
    """A campaign with the texts of all its files: everything that a simulation needs."""

    toml: str
    cifs: Mapping[str, str]  # by the phase's name
    instprm: str  # of the bank alone
    growth: str = ""  # what joined the samples, as JSON; see bragg_data.growth

    @cached_property
    def _file(self) -> CampaignFile:
        return parse_campaign_file(self.toml)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._file.name

    @property
    def description(self) -> str:
        """One line about the data set."""
        return self._file.description

    @property
    def size(self) -> float:
        """Crystallite size in µm."""
        return float(self._file.broadening.size)

    @property
    def microstrain(self) -> float:
        """Microstrain in units of 1e-6."""
        return float(self._file.broadening.microstrain)

    @property
    def setup(self) -> tuple[tuple[Phase, ...], Instrument, TofGrid, float, float]:
        """Phases, instrument, grid, size and microstrain, as the simulators take them."""
        return self.phases, self.instrument, self.grid, self.size, self.microstrain

    @property
    def measurement_effects(self) -> MeasurementEffects:
        """Ranges for domain randomisation; they do not change the simulation."""
        effects = self._file.measurement_effects
        if effects.end is None:
            return effects
        # deprecated: in µs
        start, stop = self.grid.start, self.grid.stop
        low, high = np.log(np.array(effects.end) / start) / np.log(stop / start)
        return effects.model_copy(update={"end": None, "signal_end": (float(low), float(high))})

    def rows_per_chunk(self, simulator: str) -> int:
        """Patterns per chunk, the unit of work, for a simulator ('kinematic' or 'gsas2')."""
        return int(getattr(self._file.rows_per_chunk, simulator))

    @cached_property
    def instrument(self) -> Instrument:
        """The instrument."""
        return read_instrument(self.instprm)

    @cached_property
    def grid(self) -> TofGrid:
        """The time-of-flight grid."""
        tof = self._file.tof
        return TofGrid(float(tof.start), float(tof.relative_step), tof.points)

    @cached_property
    def structures(self) -> tuple[Phase, ...]:
        """The phases as in their CIFs, in the order of their codes."""
        return tuple(phase_from_cif(self.cifs[p.name], p.name, p.block) for p in self._file.phases)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases as they scatter to the bank, in the order of their codes."""
        return tuple(phase.at_angle(self.instrument.two_theta) for phase in self.structures)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the CIFs leave open, and how it was read: sentences that name their phase."""
        return tuple(f"Phase '{p.name}': {text}" for p in self.phases for text in p.assumptions)

    @cached_property
    def samples(self) -> Samples:
        """All samples, in the seeded, shuffled order in which they are stored.

        A CampaignError is raised if a range contains cells that do not belong to the phase's
        crystal system, or that enclose no volume.
        """
        samples = self._drawn
        for number, growth in enumerate(self.growths):
            samples = samples[: growth.parent_samples]
            further = self.candidates(samples, growth.seed, growth.candidates, number)
            samples = _joined([samples, further[growth.rows]])
        n_drawn = self.growths[0].parent_samples if self.growth else None
        return replace(samples, n_drawn=n_drawn)

    @cached_property
    def growths(self) -> tuple[Growth, ...]:
        """What joined the samples that the campaign file alone draws."""
        return growths_of(self.growth)

    def candidates(self, samples: Samples, seed: int, count: int, number: int) -> Samples:
        """Draw about ``count`` candidates for the next growth of a data set with these samples.

        They lie anywhere in the ranges, and are of the phases in the shares that the samples have.
        ``number`` is that of the growths before.
        """
        parts = []
        root = np.random.SeedSequence(self._file.seed, spawn_key=(_GROWTH, seed, number))
        shares = np.bincount(samples.phase, minlength=len(self.phases)) / len(samples)
        order, *streams = root.spawn(len(self.phases) + 1)
        for code, (phase, share) in enumerate(zip(self.phases, shares, strict=True)):
            if n_of_phase := int(np.ceil(share * count)):
                generator = np.random.default_rng(streams[code])
                config = self._file.phases[code]
                cells = cells_of_phase(config, phase, generator, n_of_phase)
                parts.append(_of_phase(code, phase, cells))
        joined = _joined(parts)
        return joined[np.random.default_rng(order).permutation(len(joined))]

    @cached_property
    def _drawn(self) -> Samples:
        parts = []
        # One stream per phase: adding a phase leaves the others' samples as they were.
        streams = np.random.SeedSequence(self._file.seed).spawn(len(self._file.phases) + 1)
        for code, (phase, stream) in enumerate(zip(self.phases, streams[1:], strict=True)):
            config = self._file.phases[code]
            cells = cells_of_phase(config, phase, np.random.default_rng(stream))
            if not len(cells):
                raise CampaignError(f"Phase '{config.name}' of campaign '{self.name}' is empty.")
            parts.append(_of_phase(code, phase, cells))
        in_order = _joined(parts)
        return in_order[np.random.default_rng(streams[0]).permutation(len(in_order))]

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Everything that identifies the data set, as plain JSON values; comments do not count."""
        resolved: dict[str, Any] = _plain(
            self._file.model_dump(exclude={"description", "rows_per_chunk", "measurement_effects"})
        )
        resolved["instrument"] = {"sha256": self.instrument.sha256}
        for phase in resolved["phases"]:
            phase["cif"] = {"sha256": hashlib.sha256(self.cifs[phase["name"]].encode()).hexdigest()}
            if phase["block"] is None:  # identities of before there were blocks
                del phase["block"]
        if self.growths:
            resolved["growth"] = [dict(growth.draw) for growth in self.growths]
        return resolved

    def parameter_ranges(self, phase: int) -> dict[str, list[tuple[float, float]]]:
        """Return the ranges of a phase's free cell parameters, in ångström or degrees."""
        ranges = self.definition["phases"][phase]["cell"]
        return {
            name: [(float(r["low"] or r["first"]), float(r["high"] or r["last"])) for r in of_name]
            for name, of_name in ranges.items()
        }

    @property
    def phase_identities(self) -> tuple[str, ...]:
        """What the patterns of each phase depend on, next to their cells, as JSON texts.

        That is all of the definition but how the phase is called and which cells are drawn.
        """
        common = {k: v for k, v in self.definition.items() if k not in _OF_THE_DRAW}
        phases = self.definition["phases"]
        structures = ({k: v for k, v in p.items() if k not in _OF_THE_DRAW} for p in phases)
        return tuple(json.dumps([common, structure], sort_keys=True) for structure in structures)

    def identity(self, simulator: str, version: str, limit: int | None = None) -> str:
        """Return the SHA-256 (hex) that identifies the data set of a simulator and its version.

        With ``limit`` only the first samples are simulated.
        """
        count = len(self.samples)
        key = {
            "campaign": self.definition,
            "rows_per_chunk": self.rows_per_chunk(simulator),
            "samples": count if limit is None else min(limit, count),
            "simulator": simulator,
            "simulator_version": version,
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _of_phase(code: int, phase: Phase, cells: Array) -> Samples:
    codes = np.full(len(cells), code, np.int8)
    return Samples(codes, np.full(len(cells), phase.crystal_system, np.int8), cells)


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(
        np.concatenate([part.phase for part in parts]),
        np.concatenate([part.crystal_system for part in parts]),
        np.concatenate([part.cells for part in parts]),
    )


def number_text(text: str) -> str:
    """Write a number of a campaign's definition without an exponent: 1000, not 1E+3."""
    return f"{Decimal(text):f}"


def ranges_text(ranges: Sequence[Mapping[str, str | None]]) -> str:
    """Write a parameter's ranges in a campaign's definition: 3.9 to 4.1 by 0.01 and 4.2 to 4.3."""
    spans = [{name: number_text(text) for name, text in r.items() if text} for r in ranges]
    grid, interval = "{first} to {last} by {step}", "{low} to {high}"
    return " and ".join((grid if "first" in s else interval).format(**s) for s in spans)


def _plain(value: Any) -> Any:
    """Return JSON values in which equal numbers are equal texts (1.0 and 1.00)."""
    if isinstance(value, Decimal):
        return str(value.normalize())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def load_campaign(name_or_path: str | Path) -> Campaign:
    """Load a campaign by the name of one that ships with the project, or by the path of its file.

    Raises a CampaignError if the file, a CIF or the instrument file is missing or wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = BUILT_IN / (str(name_or_path).replace("-", "_") + ".toml")
        if not path.is_file():
            known = ", ".join(sorted(p.stem.replace("_", "-") for p in BUILT_IN.glob("*.toml")))
            raise CampaignError(
                f"Campaign '{name_or_path}' is not known. Give a .toml file, or one of: {known}."
            )
    try:
        toml = read_bounded(path, MOST_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise CampaignError(f"Campaign file {path} cannot be read: {reason}.") from error
    try:
        file = parse_campaign_file(toml)
        # Reading by its path refuses a bad file by its path.
        cifs = {p.name: read_phase(path.parent / p.cif, p.name, p.block).cif for p in file.phases}
        instrument = read_instrument(path.parent / file.instrument.file, file.instrument.bank)
    except (CampaignError, CrystalError, InstrumentError) as error:
        raise CampaignError(f"Campaign {path}: {error}") from error
    return Campaign(toml, cifs, instrument.text)


def read_cells(path: Path, campaign: Campaign) -> Samples:
    """Read a list of cells, for the campaign's phases, from a CSV file.

    Its columns are crystal_system, a, b, c (Å), alpha, beta, gamma (degrees) and optionally phase,
    which is needed where several phases share a crystal system. Raises a CampaignError if the file
    is unreadable, lacks a column, or holds a cell that no phase of the campaign can have.
    """
    import pandas as pd  # here alone, because it takes half a second

    try:
        # Blank lines are kept until the end, so that a row knows its line.
        table = pd.read_csv(
            io.BytesIO(read_bounded(path, _MOST_CELLS_BYTES)),
            skipinitialspace=True,
            skip_blank_lines=False,
            dtype={"phase": str, "crystal_system": str},
        ).dropna(how="all")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise CampaignError(f"Cells file {path} cannot be read as CSV: {reason}.") from error
    missing = [c for c in ("crystal_system", *CELL_PARAMETERS) if c not in table.columns]
    if missing:
        raise CampaignError(f"Cells file {path} lacks the column(s) {', '.join(missing)}.")
    if table.empty:
        raise CampaignError(f"Cells file {path} holds no cells.")
    values = table[list(CELL_PARAMETERS)].apply(pd.to_numeric, errors="coerce")
    cells = values.to_numpy(dtype=np.float64)
    names = table["phase"].fillna("") if "phase" in table.columns else [""] * len(table)
    codes = np.empty(len(table), dtype=np.int8)
    for row, (system, name) in enumerate(zip(table["crystal_system"], names, strict=True)):
        cell, where = cells[row : row + 1], f"Cells file {path}, line {table.index[row] + 2}"
        if not np.isfinite(cell).all():
            raise CampaignError(f"{where}: a cell parameter is not a number.")
        try:
            codes[row] = _phase_code(str(system).strip(), name.strip(), campaign.phases)
            check_volume(cell)
            campaign.phases[codes[row]].lattice.check(cell)
        except (CampaignError, CrystalError) as error:
            raise CampaignError(f"{where}: {error}") from error
    systems = np.array([p.crystal_system for p in campaign.phases], dtype=np.int8)
    return Samples(codes, systems[codes], cells)


def _phase_code(system: str, name: str, phases: Sequence[Phase]) -> int:
    known = ", ".join(phase.name for phase in phases)
    if name:
        matching = [code for code, phase in enumerate(phases) if phase.name == name]
        if not matching:
            raise CampaignError(f"phase '{name}' is none of the campaign's: {known}.")
        actual = phases[matching[0]].crystal_system.name
        if actual != system:
            raise CampaignError(f"phase '{name}' is {actual}, not {system}.")
        return matching[0]
    if system not in CrystalSystem.__members__:
        raise CampaignError(
            f"'{system}' is no crystal system. Choose one of "
            f"{', '.join(CrystalSystem.__members__)}."
        )
    matching = [code for code, phase in enumerate(phases) if phase.crystal_system.name == system]
    if len(matching) != 1:
        number = "several phases" if matching else "no phase"
        raise CampaignError(
            f"the campaign has {number} of crystal system {system}. Its phases are {known}"
            + ("; name one in a column 'phase'." if matching else ".")
        )
    return matching[0]
