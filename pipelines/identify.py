"""Identify which of many structures are in a sample, with their cells and weight fractions."""

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
    phases: Annotated[
        list[Path],
        Option(metavar="FOLDER", help="Folder of CIFs, campaign file, or CIF (repeatable)."),
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
            help="In the end add sites' displacements, coordinates, absorption, extinction and "
            "preferred orientation where the data show them.",
        ),
    ] = True,
    standard: StandardOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Identify which of many structures are in a sample.

    The structures whose patterns explain most of what is left of the profiles are refined, one
    after the other, as long as they earn their parameters; cells may differ from the CIFs' by 3 %.
    The result is that of a joint refinement of all banks (bragg refine): cells, weight fractions,
    and lines that no structure explains. Structures that explain as much nearly as well, as those
    of many metals, are named. Patterns are simulated once for each folder and bank, and kept.
    """
    from pipelines.refinement.inputs import request_of
    from pipelines.refinement.interface import identify_samples
    from pipelines.refinement.output import show_samples
    from pipelines.report.refinement import render_refinements

    request = request_of(files, instrument, banks, standard)
    known = (file for place in phases for file in (place, *place.rglob("*.[cC][iI][fF]")))
    output.check([*request.inputs([]), *known])
    samples = identify_samples(request, phases, evidence=evidence, quiet=as_json)
    show_samples(samples, output, render_refinements, as_json=as_json)
    if as_json:
        return
    words = "--cif", "FILE.cif", "--instrument", instrument, *banks.words(standard)
    again = command_line("refine", *files, *words)
    next_commands((again, "refine what was identified, or other structures"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
