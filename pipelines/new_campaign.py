"""Write a campaign file for your structures and your instrument."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say

if TYPE_CHECKING:
    from bragg_data.campaign_design import CampaignDesign

CifOption = Annotated[
    list[str], Option("--cif", metavar="FILE.cif[:BLOCK]", help="A structure (repeatable).")
]
InstrumentOption = Annotated[
    Path, Option(metavar="FILE", help=".instprm, .prm, .iparm, .EXP, .irf or .pcr.")
]
BankOption = Annotated[
    str | None,
    Option(metavar="N|all", help="Bank; by default the sharpest that sees enough lines."),
]
LikeOption = Annotated[
    Path | None, Option(metavar="FILE", help="Measured profile, for its range and binning.")
]
RangeOption = Annotated[
    list[str],
    Option(
        "--range",
        metavar="[PHASE:]RANGE",
        help="3% (of all lengths), 2deg (of all angles), a=3.9:4.1, cubic:a=3.9:4.1 (repeatable).",
    ),
]
BudgetOption = Annotated[
    float, Option(min=0.1, metavar="MINUTES", help="Time for everything, on this machine.")
]


def main(
    cif: CifOption,
    instrument: InstrumentOption,
    bank: BankOption = None,
    like: LikeOption = None,
    ranges: RangeOption = [],  # noqa: B006 (Typer's default of a repeatable option)
    budget: BudgetOption = 8.0,
    name: Annotated[str | None, Option(help="Name of the campaign.")] = None,
    seed: Annotated[int, Option(min=0, help="Of the random numbers.")] = 1,
    out: Annotated[Path, Option(metavar="FOLDER", help="Where to write.")] = Path(),
    png: Annotated[
        Path | None, Option(metavar="FILE", help="Figure of patterns; by default NAME.png.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace a different file.")] = False,
) -> None:
    """Write a campaign file for your structures and your instrument.

    Bank, range of times, grid, ranges of the cells, number of samples and measurement effects are
    chosen and explained; the file may be edited. A figure shows patterns as they will be simulated.
    From the file, run makes a data set, a model and predictions of your profiles; it also takes the
    structures and the instrument directly.
    """
    from bragg_data.campaign_design import (
        DesignError,
        DesignOptions,
        design_campaign,
        design_each_bank,
    )
    from pipelines.inspection.designs import draw_design

    if not out.is_dir():
        raise options.OutputError(
            f"There is no folder {out}: make it, or name another one (--out)."
        )
    options.check_writable(png)
    if bank == "all" and png is not None:
        raise DesignError("--bank all draws a figure of each bank: omit --png.")
    number = bank_number(bank)
    stated = DesignOptions(tuple(cif), instrument, number, like, tuple(ranges), budget, name, seed)
    if bank == "all":
        designs, refused = design_each_bank(stated, out)
    else:
        designs, refused = [design_campaign(stated, out)], []
    files = [out / f"{design.name}.toml" for design in designs]
    for design, file in zip(designs, files, strict=True):
        _write(design, file, force=force)
        draw_design(design, png or file.with_suffix(".png"))
        _report(design, file, png or file.with_suffix(".png"))
    for reason in refused:
        say(f"[yellow]Left out: {escape(reason)}[/]")
    next_commands(*((command_line("run", file), "simulate, train and test") for file in files))


def bank_number(bank: str | None) -> int | None:
    """Return the number of a bank; None of no bank and of all. Raises a DesignError of others."""
    from bragg_data.campaign_design import DesignError

    if bank is None or bank == "all":
        return None
    if not re.fullmatch("[0-9]{1,9}", bank):
        raise DesignError(f"'{bank}' is no bank: give its number, or all.")
    return int(bank)


def _write(design: CampaignDesign, file: Path, *, force: bool) -> None:
    if file.is_dir() or (file.exists() and not force and file.read_bytes() != design.toml.encode()):
        raise options.OutputError(
            f"{file} exists and is different: name another campaign (--name), or replace it "
            f"(--force)."
        )
    file.write_text(design.toml, encoding="utf-8")


def _report(design: CampaignDesign, file: Path, png: Path) -> None:
    say(f"[bold]{design.name}[/]")
    for assumption in design.assumptions:
        say(f"  • {escape(assumption)}")
    for warning in design.warnings:
        say(f"  [yellow]• {escape(warning)}[/]")
    say(f"Written: {escape(str(file))}, figure {escape(str(png))}\n")


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
