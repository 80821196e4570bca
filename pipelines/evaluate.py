"""Score the registered models on three test sets, with the paper's results and baselines."""

import time
from pathlib import Path
from typing import Annotated

from typer import Option

from pipelines.cli import options
from pipelines.cli.console import duration, next_commands, print_json, run, say


def main(
    data: Annotated[str | None, Option(help="Data set; by default the newest trained on.")] = None,
    offgrid: Annotated[
        str | None, Option(help="Data set of cells between; batio3-offgrid-v1 if it exists.")
    ] = None,
    models: Annotated[
        list[str] | None,
        Option(
            metavar="NAME_OR_URI",
            help="A model's name (its newest version of each split) or models:/NAME/VERSION; "
            "again for more. All by default.",
        ),
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    as_json: options.JsonOption = False,
    markdown: Annotated[Path | None, Option(metavar="FILE", help="Write the tables there.")] = None,
    bootstrap: Annotated[int, Option(min=2, help="Resamples, for 95 % intervals.")] = 1000,
    limit: Annotated[int | None, Option(min=1, help="Most samples of each test set.")] = None,
    library: Annotated[bool, Option(help="Compare with the library match (minutes).")] = True,
) -> None:
    """Score the registered models on three test sets, with the paper's results and baselines.

    The test sets are the paper's random fifth, a fifth held out in blocks, and cells between the
    grid's points. Of each model the newest version of each split is scored.
    """
    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from pipelines.evaluation.names import EQUATION_1
    from pipelines.evaluation.synthetic import EvaluationSettings, run_evaluation

    began = time.monotonic()
    names = tuple(dict.fromkeys(models or ()))
    settings = EvaluationSettings(data, offgrid, names, bootstrap, limit, library)
    report = run_evaluation(Store(store), Tracking(tracking), settings, quiet=as_json)
    if markdown is not None:
        markdown.write_text(report.markdown(), encoding="utf-8")
    if as_json:
        print_json(report.to_json())
        return
    for table in report.tables():
        say()
        table.show()
    say(
        f"{EQUATION_1} In brackets: 95 % of {bootstrap:,} bootstrap resamples of the samples, in "
        f"the power of ten of the number before. Of each model the newest version of each split."
    )
    say(f"Run {report.run_id} in {tracking}, after {duration(time.monotonic() - began)}")
    next_commands(("make ui", "look at runs and models in a browser"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
