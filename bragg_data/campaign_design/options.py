"""What a user states of a campaign to be designed."""

from dataclasses import dataclass
from pathlib import Path


class DesignError(ValueError):
    """Options, structures or an instrument from which no campaign can be designed."""


@dataclass(frozen=True)
class DesignOptions:
    """What a user states of a campaign; the rest is chosen."""

    cifs: tuple[str, ...]  # FILE.cif, or FILE.cif:BLOCK
    instrument: Path  # any instrument file that can be read
    bank: int | None = None  # by default the one of best resolution that sees enough lines
    like: Path | None = None  # a measured file, for its range and binning
    ranges: tuple[str, ...] = ()  # 3%, 2deg, a=3.9:4.1, PHASE:a=3.9:4.1; the last counts
    budget: float = 8.0  # minutes, for everything
    name: str | None = None  # by default from structures and instrument
    seed: int = 1
