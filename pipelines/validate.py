"""Ask models about measured profiles whose cells are known: Tables IV and V, figures, a record."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import xarray as xr
from matplotlib.figure import Figure

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.instrument.instprm import Instrument, InstrumentError, read_instruments
from bragg_data.measurement.load import ANGLE_TOLERANCE
from bragg_data.provenance import code_commit
from bragg_data.refinement.linear_fit import (
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.repository import DEFAULT_URI, Store
from bragg_data.store.schema import campaign_of, samples_of
from bragg_models.targets import targets_of
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import next_commands, run, say
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.cluster.client import open_client
from pipelines.cluster.options import check_cluster
from pipelines.evaluate import answers_of, candidates
from pipelines.evaluation import draws as trials
from pipelines.evaluation.measured import (
    FROM_LIBRARY,
    STRUCTURE,
    Known,
    Refinement,
    Validation,
    baselines,
    known_from_dataset,
    known_from_file,
    library_matches,
    refined,
    refinement_sheet,
    sureness_sheet,
    validate,
)
from pipelines.evaluation.scoring import CONSTANT
from pipelines.evaluation.summary import CLASS_CONDITIONAL, MODELS
from pipelines.evaluation.tables import EQUATION_1
from pipelines.prediction.predict import INDICES, indexed_library
from pipelines.registry.feature_views import RegisteredModel
from pipelines.registry.registration import load_version
from pipelines.report.figures import draw
from pipelines.training.task import default_tag

app = typer.Typer(add_completion=False)

_DRAWN = 3  # samples of a set, as in the paper's Fig. 6


class ValidateError(ValueError):
    """A validation that cannot be made as asked."""


@app.command()
def main(
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG|FILE.npz",
            help="A measured data set with labels, or pseudo-experiments (their truth in a JSON "
            "file beside); again for more. By default every measured data set with labels.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|URI", help=f"Of {', '.join(MODELS)}; by default all."),
    ] = None,
    trained_on: Annotated[
        str | None, typer.Option(metavar="TAG", help="Data set of the models and the library.")
    ] = None,
    library: Annotated[bool, typer.Option(help="The library match among the baselines.")] = True,
    refine: Annotated[
        bool, typer.Option(help="Refinement from the library match among the baselines.")
    ] = True,
    draws: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Fresh draws of each phase: how sure, how "
            "right are the models that tell intervals? 5000 take 5 minutes.",
        ),
    ] = 0,
    foreign: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Foreign profiles of each kind: are they refused? 200 take 10 minutes.",
        ),
    ] = 0,
    refined_draws: Annotated[
        int,
        typer.Option(
            "--refined-draws",
            min=0,
            metavar="N",
            help="Draws of each phase to refine from several starts. 500 take 20 minutes.",
        ),
    ] = 0,
    other: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instrument file with another bank to offer with --foreign."
        ),
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="local|slurm|ADDRESS", help="Where draws are made and asked.")
    ] = "local",
    bootstrap: Annotated[int, typer.Option(min=10, help="Resamples of the intervals.")] = 1000,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the figures there, too.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables there.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything there.")
    ] = None,
    store: Annotated[str, typer.Option(metavar="URI", help="Directory of the store.")] = (
        DEFAULT_URI
    ),
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
) -> None:
    """Compare models, constant answers and the library match on profiles that are known.

    Prints the paper's Tables IV and V with ours beside, draws the patterns of the answers over the
    measurements, and keeps everything as a run in MLflow.

    With --draws, --foreign or --refined-draws, models that tell intervals are tried on fresh draws
    of measured-looking profiles: how right and how sure they are, what they refuse, and from where
    the refinement finds the right minimum. Without --data it is these alone.
    """
    for path in (markdown, as_json):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValidateError(
                f"{path} cannot be written: name a file in a directory that exists."
            )
    place = Tracking(tracking)
    check_cluster(cluster)
    repository = Store(store)
    dataset = repository.open(trained_on or default_tag(repository))
    campaign, labels = campaign_of(dataset), samples_of(dataset)
    targets = targets_of(campaign.phases, labels.phase, labels.cells)
    bank = other_bank(other, campaign) if other is not None else None
    tried = draws or foreign or refined_draws
    sets = _sets(data, repository, campaign) if data is not None or not tried else []
    chosen = [c for c in candidates(place, dataset, models or ()) if models or c.split == "random"]
    loaded = {c.label: load_version(place.uri, c.version) for c in chosen}
    learnt = [answers_of(c, loaded[c.label]) for c in chosen]
    matches: list[Any] = [None] * len(sets)
    fits: list[dict[str, Refinement]] = [{} for _ in sets]
    if library and sets:
        matches = library_matches(indexed_library(dataset, campaign, progress=True), sets)
    if library and refine and sets:
        refiner = Refiner(campaign, cache=INDICES)
        begin = {FROM_LIBRARY: None} | {
            f"{label} and {FROM_LIBRARY}": one for label, one in loaded.items()
            if one.has_intervals
        }  # fmt: skip
        fits = [
            {label: refined(known, m, refiner, one) for label, one in begin.items()}
            for known, m in zip(sets, matches, strict=True)
        ]
    asked = [
        [*baselines(campaign, labels, m, fit), *learnt]
        for m, fit in zip(matches, fits, strict=True)
    ]
    named = {one.key: one.label for own in asked for one in own}
    found = [
        validate(known, targets, own, resamples=bootstrap)
        for known, own in zip(sets, asked, strict=True)
    ]
    text = _facts(dataset, bootstrap)
    for one, fit in zip(found, fits, strict=True):
        for sheet in one.sheets(targets, campaign.name):
            sheet.show()
            text += "\n" + sheet.markdown()
        more = [sureness_sheet(one.known, targets, loaded)]
        if fit:
            more.append(refinement_sheet(one.known, targets, fit))
        for extra in more:
            if extra is not None:
                extra.show()
                text += "\n" + extra.markdown()
        text += "\n" + one.samples_sheet(targets, named).markdown()
    say(EQUATION_1)
    drawn = {one.known.name: _figures(one, campaign, named) for one in found}
    if tried:
        those = {c.label: RegisteredModel(place.uri, c.version) for c in chosen
                 if loaded[c.label].has_intervals}  # fmt: skip
        if not those:
            raise ValidateError(
                "None of these models tells intervals, so there is nothing to try on draws. Train "
                "one with python -m pipelines.train robust, or name it with --models."
            )
        amount = trials.Amount(draws, foreign, refined_draws, bank)
        with open_client(cluster) as client:
            for label, registered in those.items():
                sheets, figure = trials.tried(client, registered, campaign.phases, label, amount)
                text += "".join("\n" + sheet.markdown() for sheet in sheets)
                if figure is not None:
                    drawn.setdefault("fresh draws", {})[label] = figure
    tags = {"data": dataset.attrs["tag"], "snapshot_id": dataset.attrs["snapshot_id"],
            "code_commit": code_commit(), "mlflow.source.name": "pipelines.validate"}  # fmt: skip
    with place.run(str(dataset.attrs["campaign"]), "validation", tags) as run_:
        run_.log_dataset(dataset, "library")
        run_.log_parameters(
            {"sets": [k.name for k in sets], "models": [c.version.uri for c in chosen]}
        )
        run_.log_metrics({_slug(one.known.name): _metrics(one) for one in found})
        run_.log_text(text, "validation.md")
        for name, pages in drawn.items():
            for label, figure in pages.items():
                run_.log_figure(figure, f"figures/{_slug(name)}/{_slug(label)}.png")
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
    if as_json is not None:
        told = json.dumps([one.to_json(targets) for one in found], indent=1, ensure_ascii=False)
        as_json.write_text(told, encoding="utf-8")
    if figures is not None:
        for name, pages in drawn.items():
            directory = figures / _slug(name)
            directory.mkdir(parents=True, exist_ok=True)
            for label, figure in pages.items():
                figure.savefig(directory / f"{_slug(label)}.png", dpi=130)
    written = [str(p) for p in (markdown, as_json, figures) if p is not None]
    say(f"Run {run_.id} in {place.uri}" + (f"; written: {', '.join(written)}" if written else ""))
    next_commands(
        [
            ("make ui", "the run's tables and figures in a browser"),
            (f"python -m pipelines.predict FILE --plot answer.png --tracking "
             f"{shlex.quote(tracking)}", "ask about one profile"),
        ]
    )  # fmt: skip


def other_bank(path: Path, campaign: Campaign) -> Instrument:
    """Return the bank of a file that is most like the campaign's, but at another angle."""
    difc, angle = campaign.instrument.difc, campaign.instrument.two_theta
    # The same bank with another calibration is no other bank.
    banks = [one for one in read_instruments(path) if abs(one.two_theta - angle) > ANGLE_TOLERANCE]
    for bank in sorted(banks, key=lambda one: abs(np.log(one.difc / difc))):
        with suppress(InstrumentError):  # no peak shape in a part of the window
            Simulator(campaign.phases, bank, campaign.grid, size=1.0, microstrain=1000.0)
            return bank
    raise ValidateError(
        f"{path} has no bank at another angle than {angle:g}° that gives peaks at the campaign's "
        f"times of flight: name another instrument file."
    )


def _sets(data: Sequence[str] | None, store: Store, campaign: Campaign) -> list[Known]:
    sets: list[Known] = []
    if data is None:
        for tag in store.tags():
            dataset = store.open(tag.name)
            if "measurements" in dataset.attrs and (dataset.phase.values >= 0).any():
                sets.append(_of_grid(dataset, campaign))
        if not sets:
            raise ValidateError(
                f"{store.uri} holds no measured data set with labels. Make one with python -m "
                f"pipelines.ingest FILE… --labels CSV --into NAME, or name one with --data."
            )
    for one in data or ():
        if one.endswith(".npz"):
            sets += known_from_file(Path(one), campaign)
        else:
            sets.append(_of_grid(store.open(one), campaign))
    return sets


def _of_grid(dataset: xr.Dataset, campaign: Campaign) -> Known:
    other = campaign_of(dataset)
    names = [[p.name for p in c.phases] for c in (other, campaign)]
    if other.grid != campaign.grid or names[0] != names[1]:
        raise ValidateError(
            f"{dataset.attrs['tag']} is on the grid of campaign {other.name}, the models on that "
            f"of {campaign.name}. Name the models' data set with --trained-on, or ingest the "
            f"profiles with --campaign {campaign.name}."
        )
    return known_from_dataset(dataset)


def _facts(dataset: xr.Dataset, bootstrap: int) -> str:
    attrs = dataset.attrs
    return (
        f"# Measured profiles\n\n"
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}\n"
        f"- commit: {code_commit()}\n"
        f"- models and library: `{attrs['tag']}`, snapshot {attrs['snapshot_id']}\n"
        f"- intervals: 95 %, bootstrap over samples, {bootstrap} resamples, in the power of ten of "
        f"the number before them\n- {EQUATION_1}\n"
    )


def _metrics(one: Validation) -> dict[str, Any]:
    return {
        _slug(score.label): {
            group: {k: v for k, v in values.items() if np.isfinite(v)}
            for group, values in score.groups.items()
        }
        for score in one.scores
    }


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _figures(one: Validation, campaign: Campaign, named: dict[str, str]) -> dict[str, Figure]:
    """Draw, for everyone with a cell, the first samples: the answer over the measurement."""
    known = one.known
    rows = _first_of_each(known)
    simulator = simulator_of(campaign)
    tof = campaign.grid.tof
    drawn: dict[str, Figure] = {}
    asked = {"truth": (known.phase, known.cells), **one.answers}
    for key, (phase, cells) in asked.items():
        # The class-conditional models are told apart by the tables.
        if key in (CONSTANT, STRUCTURE, *CLASS_CONDITIONAL) or not np.isfinite(cells[rows]).all():
            continue
        patterns = simulator.simulate(np.asarray(phase)[rows], cells[rows])
        figure = Figure(figsize=(11, 0.4 + 3.4 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False).ravel()
        for axis, row, pattern in zip(axes, rows, patterns, strict=True):
            of = campaign.phases[int(phase[row])]
            values = ", ".join(
                f"{p} {cells[row, CELL_PARAMETERS.index(p)]:.4f}"
                for p in of.lattice.free_parameters
            )
            draw(axis, tof, known.gridded[row],
                 fit_scale_and_background(known.gridded[row], pattern),
                 title=f"{known.name}, {known.samples[row]}: {named.get(key, key)} says {of.name}, "
                 f"{values}", color=SYSTEM_COLORS[of.crystal_system],
                 ticks=reflection_positions(of, cells[row], campaign)[0])  # fmt: skip
        axes[-1].set_xlabel("time of flight (µs)")
        drawn[named.get(key, key)] = figure
    return drawn


def _first_of_each(known: Known) -> list[int]:
    """Return rows: the first of each phase, then the first ones, as many as are drawn."""
    firsts = [int(np.flatnonzero(known.phase == code)[0]) for code in np.unique(known.phase)]
    others = [row for row in range(len(known.samples)) if row not in firsts]
    return sorted([*firsts, *others][: max(_DRAWN, len(firsts))])


if __name__ == "__main__":
    run(app)
