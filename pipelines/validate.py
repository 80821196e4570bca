"""Validate models on measured profiles whose cells are known: Tables IV and V, figures, a run."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say
from pipelines.evaluation.names import MODELS, EvaluateError

_DPI = 130


def main(
    data: Annotated[
        list[str] | None,
        Option(
            metavar="TAG|FILE.npz",
            help="A measured data set with labels, or pseudo-experiments (with their truth in a "
            "JSON file of the same name); again for more. By default every measured data set with "
            "labels.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        Option(metavar="NAME|URI", help=f"Of {', '.join(MODELS)}; by default all."),
    ] = None,
    trained_on: Annotated[
        str | None, Option(metavar="TAG", help="Data set of the models and the library.")
    ] = None,
    preprocessing: Annotated[
        str,
        Option(
            metavar="ours|paper",
            help="paper adds Tables IV and V after the paper's own preprocessing (its section "
            "V-C1), for the profiles that its background exists for.",
        ),
    ] = "ours",
    library: Annotated[bool, Option(help="Add the library match to the baselines.")] = True,
    refine: Annotated[bool, Option(help="Add the refinement from it to the baselines.")] = True,
    bootstrap: Annotated[int, Option(min=10, help="Resamples of the intervals.")] = 1000,
    figures: Annotated[Path | None, Option(metavar="DIR", help="Write the figures there.")] = None,
    markdown: Annotated[Path | None, Option(metavar="FILE", help="Write the tables there.")] = None,
    as_json: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write all there.")
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    *,
    on_draws: options.DrawOptions,
) -> None:
    """Compare models, constants and the library match on profiles whose cells are known.

    Prints the paper's Tables IV and V with our results, draws the predicted patterns with the
    measurements, and logs everything as a run in MLflow.

    With --draws, --foreign or --refined-draws, models with intervals are evaluated on simulated
    measurements: accuracy and calibration, rejection of foreign profiles, and the starts from which
    the refinement reaches the correct minimum. Without --data it is these alone.
    """
    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from pipelines.evaluation.validation import ValidationSettings, run_validation

    options.check_writable(markdown, as_json)
    if preprocessing not in ("ours", "paper"):
        raise EvaluateError(f"There is no preprocessing '{preprocessing}'. Choose ours or paper.")
    options.check_cluster(on_draws.cluster)
    names = None if data is None else tuple(data), tuple(models or ()), trained_on
    paper = preprocessing == "paper"
    settings = ValidationSettings(*names, library, refine, paper, bootstrap, on_draws)
    report = run_validation(Store(store), Tracking(tracking), settings)
    if markdown is not None:
        markdown.write_text(report.text, encoding="utf-8")
    if as_json is not None:
        text = json.dumps(report.results, indent=1, ensure_ascii=False)
        as_json.write_text(text, encoding="utf-8")
    if figures is not None:
        for file, figure in report.figures.items():
            (figures / file).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(figures / file, dpi=_DPI)
    written = [str(p) for p in (markdown, as_json, figures) if p is not None]
    suffix = f"; written: {', '.join(written)}" if written else ""
    say(f"Run {report.run_id} in {tracking}{suffix}")
    predict = command_line("predict", "FILE", "--plot", "prediction.png", tracking=tracking)
    next_commands(("make ui", "tables and figures in a browser"), (predict, "predict one profile"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
