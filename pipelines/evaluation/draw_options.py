"""Options of an evaluation on simulated measurements, for command lines and Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Simulated measurements"


@dataclass(frozen=True)
class DrawOptions:
    """Numbers of simulated measurements, and where they are drawn and predicted."""

    draws: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_PANEL,
            help="Draws of each phase, to check probabilities and intervals. 5000 take 5 minutes.",
        ),
    ] = 0
    foreign: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_PANEL,
            help="Foreign profiles of each kind, to check their rejection. 200 take 10 minutes.",
        ),
    ] = 0
    refined_draws: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_PANEL,
            help="Draws of each phase to refine from several starts. 500 take 20 minutes.",
        ),
    ] = 0
    other_bank: Annotated[
        Path | None,
        typer.Option(
            "--other-bank",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Instrument file with another bank, whose profiles are foreign too.",
        ),
    ] = None
    other: Annotated[Path | None, typer.Option(hidden=True)] = None  # deprecated: other_bank
    cluster: Annotated[
        str,
        typer.Option(
            metavar="local|slurm|ADDRESS",
            rich_help_panel=_PANEL,
            help="Where they are drawn and predicted.",
        ),
    ] = "local"

    @property
    def requested(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.draws or self.foreign or self.refined_draws)

    @property
    def bank_file(self) -> Path | None:
        """Instrument file with another bank, by either name of the option."""
        return self.other_bank or self.other
