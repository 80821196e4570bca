"""Convert an instrument file of GSAS or FullProf to GSAS-II's, and compare the peak widths."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say

if TYPE_CHECKING:
    from bragg_data.instrument.conversion import Array, OriginalBank

_NAMED = 12  # banks up to which a figure names each


class Action(StrEnum):
    """What to do with an instrument file."""

    CONVERT = "convert"


def main(
    action: Annotated[Action, Argument(help="convert")],
    file: Annotated[Path, Argument(help=".prm, .iparm, .EXP, .irf, .pcr or .instprm.")],
    out: Annotated[Path, Option(metavar="FILE.instprm", help="GSAS-II instrument file to write.")],
    png: Annotated[
        Path | None, Option(metavar="FILE", help="Figure of the widths; by default as --out.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Convert an instrument file of GSAS or FullProf to GSAS-II's (.instprm).

    The figure shows the peak widths over d of the file's own profile function and of the converted
    one; what could not be converted exactly is reported, and is written into the file.
    """
    import numpy as np

    from bragg_data.instrument.instprm import InstrumentError, read_banks

    del action  # there is only this one
    banks = read_banks(file)
    png = png or out.with_suffix(".png")
    if out.resolve() == file.resolve():
        raise InstrumentError(f"{out} is the file to convert: name another one with --out.")
    for path in (out, png):
        if path.is_dir() or not path.parent.is_dir():
            raise InstrumentError(
                f"{path} cannot be written: name a file in an existing directory."
            )
    widths = [bank.widths() for bank in banks]
    differences = [float(np.abs(ours / theirs - 1).max()) for theirs, ours in widths]
    warnings = [
        [*bank.instrument.warnings, *filter(None, [bank.instrument.geometry_doubt])]
        for bank in banks
    ]
    out.write_text("".join(bank.instrument.section for bank in banks), encoding="utf-8")
    _draw_widths([*zip(banks, widths, strict=True)], png)
    if as_json:
        rows = [
            {
                "bank": bank.instrument.bank,
                "two_theta": bank.instrument.two_theta,
                "difc": bank.instrument.difc,
                "width_difference": difference,
                "warnings": of_bank,
            }
            for bank, difference, of_bank in zip(banks, differences, warnings, strict=True)
        ]
        print(json.dumps({"out": str(out), "png": str(png), "banks": rows}, indent=2))
        return
    for bank, difference, of_bank in zip(banks, differences, warnings, strict=True):
        i = bank.instrument
        say(
            f"Bank {i.bank}: 2θ {i.two_theta:g}°, difC {i.difc:g} µs/Å; widths differ by at most "
            f"{100 * difference:.1f} %"
        )
        for warning in of_bank:
            say(f"  [yellow]{escape(warning)}[/]")
    say(f"Written: {len(banks)} banks to {escape(str(out))}; widths in {escape(str(png))}")
    predict = command_line("predict", "FILE", "--instrument", out)
    next_commands((predict, "predict with this calibration"))


def _draw_widths(banks: list[tuple[OriginalBank, tuple[Array, Array]]], file: Path) -> None:
    """Draw the full widths over d of both peaks of each bank to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for k, (bank, (theirs, ours)) in enumerate(banks):
        i, color = bank.instrument, f"C{k % 10}"
        label = f"bank {i.bank}, 2θ {i.two_theta:g}°" if len(banks) <= _NAMED else None
        axis.loglog(bank.d, theirs, "o", color=color, markersize=4, markerfacecolor="none")
        axis.loglog(bank.d, ours, color=color, linewidth=1.2, label=label)
    axis.set_xlabel("d / Å")
    axis.set_ylabel("full width at half maximum / µs")
    axis.set_title("Circles: the file's profile function; lines: converted", loc="left")
    if len(banks) <= _NAMED:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, format="png", dpi=130)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
