"""Refine known structures against measured profiles: cells, displacements, weight fractions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run
from pipelines.cli.refinement_options import BankOptions, RefinementOutput, StandardOption


def main(
    files: Annotated[
        list[Path],
        Argument(metavar="FILE...", help="Profiles of one sample, or several samples' one by one."),
    ],
    cif: Annotated[
        list[str], Option("--cif", metavar="FILE.cif[:BLOCK]", help="A structure (repeatable).")
    ],
    instrument: Annotated[
        Path, Option(metavar="FILE", help=".instprm, .prm, .iparm, .EXP, .irf or .pcr.")
    ],
    banks: BankOptions,
    output: RefinementOutput,
    evidence: Annotated[
        bool,
        Option(
            "--evidence/--simple",
            help="Add sites' displacements, coordinates, absorption, extinction and preferred "
            "orientation where the data show them.",
        ),
    ] = True,
    standard: StandardOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Refine known structures against measured profiles; no campaign is needed.

    All banks of a file, or of several files of different banks, are refined together: one cell for
    each phase, one displacement parameter for each site; scale, background and an error of the
    calibration for each bank. Files that repeat banks are samples of their own. Cells within 3 % of
    the CIF's are searched. A length is printed with two uncertainties, a = 5.43142(4)(60) Å: of the
    measurement, and of the calibration.
    """
    from pipelines.refinement.inputs import request_of
    from pipelines.refinement.interface import refine_samples
    from pipelines.refinement.output import show_samples
    from pipelines.report.refinement import render_refinements

    request = request_of(files, instrument, banks, standard)
    output.check(request.inputs(cif))
    show_samples(
        refine_samples(request, cif, evidence=evidence), output, render_refinements, as_json=as_json
    )
    if as_json:
        return
    words: list[object] = [word for file in cif for word in ("--cif", file)]
    words += ["--instrument", instrument, *banks.words(standard)]
    again = command_line("refine", *files, *words, "--json")
    next_commands((again, "the same, for a program"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
