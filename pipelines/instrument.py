"""Convert an instrument file of GSAS, FullProf or TOPAS to GSAS-II's, and compare widths."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, print_json, run, say

if TYPE_CHECKING:
    from bragg_data.instrument.conversion import OriginalBank

_NAMED = 12  # banks up to which a figure names each


class Action(StrEnum):
    """What to do with an instrument file."""

    CONVERT = "convert"


def main(
    action: Annotated[Action, Argument(help="convert")],
    file: Annotated[Path, Argument(help=".prm, .iparm, .EXP, .irf, .pcr, .inp or .instprm.")],
    out: Annotated[Path, Option(metavar="FILE.instprm", help="GSAS-II instrument file to write.")],
    widths: Annotated[
        Path | None,
        Option(metavar="FILE", help="Instrument file with 2θ and widths, for .inp of TOPAS."),
    ] = None,
    png: Annotated[
        Path | None, Option(metavar="FILE", help="Figure of the widths; by default as --out.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Convert an instrument file of GSAS, FullProf or TOPAS to GSAS-II's (.instprm).

    The figure shows the peak widths over d of the file's own profile function and of the converted
    one; what could not be converted exactly is reported, and is written into the file.
    """
    from bragg_data.instrument.instprm import InstrumentError, read_banks

    del action  # there is only this one
    banks = read_banks(file, widths)
    png = png or out.with_suffix(".png")
    if out.resolve() == file.resolve():
        raise InstrumentError(f"{out} is the file to convert: name another one with --out.")
    options.check_writable(out, png)
    rows, lines = [], []
    shared: dict[str, list[int]] = {}
    for bank in banks:
        i, difference = bank.instrument, bank.difference()
        warnings = [*i.warnings, *filter(None, [i.geometry_doubt])]
        row = {"bank": i.bank, "two_theta": i.two_theta, "difc": i.difc}
        names = "width_difference", "peak_difference", "position_difference"
        rows.append(row | dict(zip(names, difference, strict=True)) | {"warnings": warnings})
        width, _, maximum = difference
        how = f"widths differ by at most {100 * width:.1f} %, positions by {maximum:.1e} of T"
        how = how if any(difference) else "the same peaks"
        lines.append(f"Bank {i.bank}: 2θ {i.two_theta:g}°, difC {i.difc:g} µs/Å; {how}")
        for warning in warnings:
            shared.setdefault(warning.removeprefix(f"bank {i.bank}: "), []).append(i.bank)
    out.write_text("".join(bank.instrument.section for bank in banks), encoding="utf-8")
    _draw_widths(banks, png)
    if as_json:
        print_json({"out": str(out), "png": str(png), "banks": rows})
        return
    for line in lines:
        say(line)
    for warning, of_banks in shared.items():
        which = "Each bank" if len(of_banks) == len(banks) > 1 else f"Bank {str(of_banks)[1:-1]}"
        say(f"[yellow]{which}: {escape(warning)}[/]")
    say(f"Written: banks {len(banks)}, to {escape(str(out))}; widths in {escape(str(png))}")
    predict = command_line("predict", "FILE", "--instrument", out)
    next_commands((predict, "predict with this calibration"))


def _draw_widths(banks: Sequence[OriginalBank], file: Path) -> None:
    """Draw the full widths over d of both peaks of each bank, and their differences, to a PNG."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    angles = ScalarMappable(cmap="viridis")
    widest = max(1.0, *(abs(bank.instrument.two_theta) for bank in banks))
    angles.set_clim(0, widest)
    named = len(banks) <= _NAMED
    for k, bank in enumerate(banks):
        i, (theirs, ours) = bank.instrument, bank.widths()
        color = f"C{k % 10}" if named else angles.cmap(abs(i.two_theta) / widest)
        label = f"bank {i.bank}, 2θ {i.two_theta:g}°" if named else None
        top.plot(bank.d, theirs, "o", color=color, markersize=4, markerfacecolor="none")
        top.plot(bank.d, ours, color=color, linewidth=1.2, label=label)
        bottom.plot(bank.d, 100 * (ours / theirs - 1), color=color, linewidth=1.2)
    top.set(xscale="log", yscale="log", ylabel="full width at half maximum / µs")
    top.set_title("Circles: the file's profile function; lines: converted", loc="left")
    low, high = bottom.get_ylim()
    bottom.set(xlabel="d / Å", ylabel="width difference / %", ylim=(min(low, -1), max(high, 1)))
    bottom.axhline(0, color="0.6", linewidth=0.8)
    if named:
        top.legend(frameon=False, fontsize=8)
    else:
        figure.colorbar(angles, ax=[top, bottom], label="|2θ| / °")
    figure.savefig(file, format="png", dpi=130)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
