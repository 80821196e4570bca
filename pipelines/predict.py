"""Predict crystal system and cell of measured profiles with a registered model."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bragg_data.measurement.load import load_measurements
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Predictor
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import errors, next_commands, run, say
from pipelines.cluster.client import open_client
from pipelines.cluster.options import SlurmOptions, check_cluster
from pipelines.prediction.distributed import REFUSED, Question, Told, ask_on_cluster, files_of
from pipelines.prediction.predict import (
    INDICES,
    Answer,
    Library,
    PredictError,
    answer,
    library_of,
    load_model,
    refine,
    show,
    table_row,
)

app = typer.Typer(add_completion=False)

_FEW = 100  # files that are answered in this process, and looked for in the library unasked
_DRAWN = 20  # files of which there is a picture or a part of a page, at most
_REASONS = 10  # that are told in full
_MANY = "Many files"


@app.command()
def main(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Profiles, and folders of them: GSAS files (.gsa .gss .fxye) or columns of TOF in "
            "µs, intensity, sigma (.xye .xy .dat).",
        ),
    ],
    instrument: Annotated[
        Path | None,
        typer.Option(metavar="FILE.instprm", help="The measurement's own calibration. Do give it."),
    ] = None,
    bank: Annotated[int | None, typer.Option(help="Only this bank of the files.")] = None,
    two_theta: Annotated[
        float | None,
        typer.Option(
            min=0, max=180, help="Scattering angle (°) of the bank, if FILE does not say it."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="URI", help="models:/NAME@ALIAS or models:/NAME/VERSION."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Store for the library match; by default the model's."),
    ] = None,
    library: Annotated[
        bool | None,
        typer.Option(
            "--library/--no-library",
            help=f"Look for the most similar stored patterns as well; by default for up to {_FEW} "
            f"files.",
        ),
    ] = None,
    refined: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Refine cell, displacement factor and broadening of each plausible phase against "
            "the whole pattern, from the model's and the library's cells.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, for scripts.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print a table with commas, for spreadsheets.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", help="Draw the measurements with what the answers would look like."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="HTML",
            help="Write a page that shows the answers, what speaks for them and what was done to "
            "the data; of many answers the first 20.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help=f"local, slurm, or the address of a Dask scheduler; by default local above {_FEW} "
            f"files.",
            rich_help_panel=_MANY,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of local.", rich_help_panel=_MANY)
    ] = None,
    jobs: Annotated[
        str, typer.Option(metavar="MIN:MAX", help="Jobs of slurm.", rich_help_panel=_MANY)
    ] = "1:8",
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
) -> None:
    """Predict crystal system and cell parameters of measured profiles.

    The registered champion answers. Beside it stands the library match: the stored pattern that
    correlates best with the profile, of each crystal system; on noisy profiles it is the better
    guide as long as the model was trained on clean ones. With --refine every phase is fitted to the
    whole pattern; where no structure of the model explains the peaks, lattices are fitted to their
    positions alone, and the answer is not accepted. A file that cannot be read is told, and keeps
    no other from its answer.
    """
    if as_json and as_csv:
        raise PredictError("Give --json or --csv, not both.")
    for_scripts = as_json or as_csv
    meant = files_of(files)
    for written in (plot, page):
        if written is not None and (not written.parent.is_dir() or written.is_dir()):
            raise PredictError(
                f"{written} cannot be written: name a file in a directory that exists."
            )
    check_cluster(cluster or "local", workers)
    place = Tracking(tracking)
    predictor, version = load_model(model, place)
    wanted = len(meant) <= _FEW if library is None else library
    snapshot = library_of(predictor, store, progress=not for_scripts) if wanted else None
    question = Question(place.uri, version, instrument, bank, two_theta, refined, store)
    drawn: list[Answer] = []
    if cluster is None and len(meant) <= _FEW:
        told, drawn = _ask_here(meant, question, predictor, snapshot, progress=not for_scripts)
    else:
        slurm = SlurmOptions(jobs=jobs)
        with open_client(cluster or "local", workers=workers, slurm=slurm) as client:
            told = ask_on_cluster(
                client, meant, question, predictor, snapshot, progress=not for_scripts
            )
        if plot is not None or page is not None:
            readable = [file for file in meant if file not in told.failures][:_DRAWN]
            beside = None if page is None else snapshot
            _, drawn = _ask_here(readable, question, predictor, beside, progress=False)
    if as_json:
        print(json.dumps(told.answers, indent=2, ensure_ascii=False))
    elif as_csv:
        _print_csv(told.answers)
    elif told.answers:
        show(told.answers)
        say(f"Model {version.uri}, trained on {predictor.provenance.data.tag}")
    if plot is not None and drawn:
        from pipelines.report.figures import MOST_PANELS, answers_figure

        answers_figure(drawn, predictor.campaign).savefig(plot, dpi=130)
        some = f" (the first {MOST_PANELS})" if len(told.answers) > MOST_PANELS else ""
        errors.print(f"Drawn in [bold]{escape(str(plot))}[/]{some}", soft_wrap=True)
    if page is not None and drawn:
        from pipelines.report.page import MOST_ANSWERS, report

        total = len(told.answers)
        text = report(drawn, predictor, version.uri, total=total)
        page.write_text(text, encoding="utf-8")
        some = f" (the first {MOST_ANSWERS})" if total > MOST_ANSWERS else ""
        errors.print(f"Report in [bold]{escape(str(page))}[/]{some}", soft_wrap=True)
    if instrument is None and told.answers and not for_scripts:
        first = shlex.quote(str(files[0]))
        next_commands(
            [
                (
                    f"python -m pipelines.predict {first} --instrument YOURS.instprm",
                    "answer with the measurement's own calibration",
                )
            ]
        )
    if told.failures:
        raise PredictError(_failed(told, len(meant)))


def _ask_here(
    files: Sequence[Path],
    question: Question,
    predictor: Predictor,
    library: Library | None,
    *,
    progress: bool,
) -> tuple[Told, list[Answer]]:
    told, measured = Told(), []
    for file in files:
        try:
            measured += load_measurements(
                file, predictor.campaign, question.calibration, question.bank, question.two_theta
            )
        except REFUSED as error:
            if len(files) == 1:
                raise
            told.failures[file] = str(error)
    if not measured:
        return told, []
    answers = answer(measured, predictor, question.version.uri, library, progress=progress)
    if question.refine:
        answers = refine(
            answers, predictor, Refiner(predictor.campaign, cache=INDICES), progress=progress
        )
    told.answers = [one.to_json() for one in answers]
    return told, answers


def _failed(told: Told, count: int) -> str:
    reasons = list(told.failures.values())
    more = f" (and {len(reasons) - _REASONS:,} more)" if len(reasons) > _REASONS else ""
    return (
        f"{len(reasons):,} of {count:,} files have no answer; those of the others are complete. "
        f"{' '.join(reasons[:_REASONS])}{more}"
    )


def _print_csv(answers: Sequence[dict[str, Any]]) -> None:
    rows = [table_row(one) for one in answers]
    names = max(rows, key=len, default={})
    writer = csv.DictWriter(sys.stdout, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    run(app)
