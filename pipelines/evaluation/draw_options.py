"""Options of an evaluation on simulated measurements, for command lines and Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def _option(text: str, metavar: str) -> Any:
    panel = "Simulated measurements"
    least = 0 if metavar == "N" else None
    return typer.Option(min=least, metavar=metavar, rich_help_panel=panel, help=text)


@dataclass(frozen=True)
class DrawOptions:
    """Numbers of simulated measurements, and where they are drawn and predicted."""

    draws: Annotated[
        int,
        _option(
            "Draws of each phase, to check probabilities and intervals. 5000 take 5 minutes.", "N"
        ),
    ] = 0
    foreign: Annotated[
        int,
        _option(
            "Foreign profiles of each kind, to check their rejection. 200 take 10 minutes.", "N"
        ),
    ] = 0
    refined_draws: Annotated[
        int, _option("Draws of each phase to refine from several starts. 500 take 20 minutes.", "N")
    ] = 0
    other_bank: Annotated[
        Path | None,
        _option("Instrument file with another bank, whose profiles are foreign too.", "FILE"),
    ] = None
    other: Annotated[Path | None, typer.Option(hidden=True)] = None  # deprecated: other_bank
    cluster: Annotated[
        str, _option("Where they are drawn and predicted.", "local|slurm|ADDRESS")
    ] = "local"

    @property
    def requested(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.draws or self.foreign or self.refined_draws)

    @property
    def bank_file(self) -> Path | None:
        """Instrument file with another bank, by either name of the option."""
        return self.other_bank or self.other
