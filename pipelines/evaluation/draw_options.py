"""Options of an evaluation on simulated measurements, for command lines and Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def _option(text: str, metavar: str = "N") -> Any:
    panel = "Simulated measurements"
    least = 0 if metavar == "N" else None
    return typer.Option(min=least, metavar=metavar, rich_help_panel=panel, help=text)


_DRAWS = "Draws of each phase, to check probabilities and intervals. 5000 take 5 minutes."
_FOREIGN = "Foreign profiles of each kind, to check their rejection. 200 take 10 minutes."
_REFINED = "Draws of each phase to refine from several starts. 500 take 20 minutes."
_BANK = "Instrument file with another bank, whose profiles are foreign too."
_CLUSTER = "Where they are drawn and predicted."


@dataclass(frozen=True)
class DrawOptions:
    """Numbers of simulated measurements, and where they are drawn and predicted."""

    draws: Annotated[int, _option(_DRAWS)] = 0
    foreign: Annotated[int, _option(_FOREIGN)] = 0
    refined_draws: Annotated[int, _option(_REFINED)] = 0
    other_bank: Annotated[Path | None, _option(_BANK, "FILE")] = None
    other: Annotated[Path | None, typer.Option(hidden=True)] = None  # deprecated: other_bank
    cluster: Annotated[str, _option(_CLUSTER, "local|slurm|ADDRESS")] = "local"

    @property
    def requested(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.draws or self.foreign or self.refined_draws)

    @property
    def bank_file(self) -> Path | None:
        """Instrument file with another bank, by either name of the option."""
        return self.other_bank or self.other
