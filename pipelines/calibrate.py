"""Calibrate an instrument on a standard: difC, difA and Zero of each bank, with uncertainties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, fail, next_commands, print_json, run, say

if TYPE_CHECKING:
    from bragg_data.refinement.calibrate import Calibration


def main(
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Profiles of the standard.")],
    standard: Annotated[
        str, Option(metavar="NAME", help="si640e, lab6_660b, ceo2_674b, nac or diamond.")
    ],
    instrument: Annotated[
        Path, Option(metavar="FILE", help="Instrument file to start from; its widths stay.")
    ],
    out: Annotated[Path, Option(metavar="FILE.instprm", help="Instrument file to write.")],
    cif: Annotated[
        str | None, Option(metavar="FILE.cif", help="Structure of a standard that has none here.")
    ] = None,
    bank: Annotated[
        list[int],
        Option(help="Only this bank (repeatable); of files without numbers one for each file."),
    ] = [],  # noqa: B006 (Typer's default of a repeatable option)
    bin_edges: Annotated[
        bool | None,
        Option("--bin-edges/--bin-centres", help="Whether times are lower edges or centres."),
    ] = None,
    png: Annotated[
        Path | None, Option(metavar="FILE", help="Figure of line positions; by default as --out.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Calibrate an instrument on a standard of known cell.

    difC of each bank is refined with the certified cell fixed, difA and Zero where the data show
    the need; widths stay those of the file. The new file states how well lengths are known, which
    refine and predict then use. The figure shows where the standard's lines are, by the old and by
    the new calibration.
    """
    from dataclasses import replace

    from bragg_data.measurement.readers import Reading
    from bragg_data.refinement.calibrate import calibrate
    from bragg_data.refinement.result import RefinementError
    from bragg_data.refinement.standards import STANDARDS
    from pipelines.refinement.inputs import Request, read_samples, read_structures

    if standard not in STANDARDS:
        raise options.OutputError(
            f"There is no standard '{standard}': choose {', '.join(STANDARDS)}."
        )
    png = png or out.with_suffix(".png")
    options.check_writable(out, png)
    known = STANDARDS[standard]
    phase = known.phase(standard)
    if cif is not None:
        ((read,), _) = read_structures([cif])
        cells = read.lattice.cells([[known.a] * len(read.lattice.free_columns)])
        phase = replace(read, cell=cells[0])
    if phase is None:
        raise options.OutputError(
            f"The structure of '{standard}' is not at hand: give its CIF (--cif)."
        )
    reading = Reading(None, None, bin_edges)
    request = Request(tuple(files), instrument, tuple(bank), reading=reading)
    # Positions belong to the peaks that the new file can state.
    samples = read_samples(request, exact=False)
    calibrations: list[Calibration] = []
    refused: list[str] = []
    for of_bank in (b for sample in samples for b in sample.banks):
        try:
            done = calibrate(of_bank, phase, standard, known.su / known.a)
        except RefinementError as error:
            refused.append(str(error))
            continue
        if done.result.accepted:
            calibrations.append(done)
        else:
            refused.append(f"{of_bank.name}: {' '.join(done.result.reasons)}")
    if not calibrations:
        raise RefinementError(f"No bank could be calibrated. {' '.join(refused)}")
    out.write_text("".join(c.instrument.section for c in calibrations), encoding="utf-8")
    _draw(calibrations, png)
    if as_json:
        print_json([_row(c) for c in calibrations])
    else:
        for c in calibrations:
            i = c.instrument
            say(
                f"Bank {i.bank}: difC {i.difc:.3f}, difA {i.difa:.3f}, Zero {i.tzero:.2f}; "
                f"R_wp {100 * c.result.rwp:.2f} %; every length is known to {c.su:.1e}"
            )
        say(f"Written: {escape(str(out))}; line positions in {escape(str(png))}")
        again = command_line("refine", "FILE", "--cif", "FILE.cif", "--instrument", out)
        next_commands((again, "refine with this calibration"))
    for reason in refused:
        fail(f"Left out: {reason}")


def _row(c: Calibration) -> dict[str, object]:
    i = c.instrument
    return {
        "bank": i.bank,
        "difc": i.difc,
        "difa": i.difa,
        "tzero": i.tzero,
        "covariance": c.covariance.tolist(),
        "su": c.su,
        "rwp": c.result.rwp,
    }


def _draw(calibrations: Sequence[Calibration], file: Path) -> None:
    """Draw positions of lines against both calibrations, relative, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(calibrations) + 0.4), layout="constrained")
    axes = figure.subplots(len(calibrations), squeeze=False)[:, 0]
    for axis, c in zip(axes, calibrations, strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.plot(c.d, 1e4 * c.before, "o", color="#D55E00", markerfacecolor="none",
                  markersize=4, label="by the file that was given")  # fmt: skip
        axis.plot(c.d, 1e4 * c.after, "o", color="#0072B2", markersize=4, label="calibrated")
        axis.set(ylabel="ΔT / T (1e-4)")
        i = c.instrument
        axis.set_title(f"bank {i.bank}, 2θ {i.two_theta:g}°", loc="left", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("d / Å")
    figure.savefig(file, format="png", dpi=130)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
