"""Predict crystal system and cell of measured profiles with a registered model."""

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say

_CLUSTER = options.ClusterOptions(cluster=None)  # this process for few files


def main(
    files: Annotated[
        list[Path],
        Argument(
            metavar="FILE...",
            help="Profiles, and folders of them: GSAS files (.gsa .gss .fxye) or columns of TOF, d "
            "or Q, intensity, sigma (.xye .xy .dat).",
        ),
    ],
    profile: options.ProfileOptions,
    model: options.ModelOption = None,
    store: Annotated[
        str | None,
        Option(metavar="URI", help="Store of the library match; by default the model's."),
    ] = None,
    library: Annotated[
        bool | None,
        Option(
            "--library/--no-library",
            help="Find the most similar stored patterns as well; by default for up to 100 files.",
        ),
    ] = None,
    refine: Annotated[
        bool,
        Option(
            "--refine",
            help="Refine cell, displacement factor and broadening of each plausible phase against "
            "the whole pattern, from the model's and the library's cells.",
        ),
    ] = False,
    as_json: options.JsonOption = False,
    as_csv: Annotated[bool, Option("--csv", help="Print comma-separated values.")] = False,
    plot: Annotated[Path | None, Option(metavar="PNG", help="Draw calculated patterns.")] = None,
    page: Annotated[
        Path | None,
        Option(
            "--report",
            metavar="HTML",
            help="Write a page that shows the predictions, the evidence for them and how the data "
            "were prepared; of many predictions the first 20.",
        ),
    ] = None,
    cluster: options.ClusterOptions = _CLUSTER,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Predict crystal system and cell parameters of measured profiles.

    The registered champion predicts; the library match is the stored pattern that correlates best
    with the profile, of each crystal system, and on noisy profiles the better guide as long as the
    model was trained on clean ones. With --refine every phase is fitted to the whole pattern; where
    no structure of the model explains the peaks, lattices are fitted to their positions alone, and
    the prediction is not accepted. More than 100 files are predicted by the workers of a cluster,
    by default of this machine. A file that cannot be read is named at the end; the results of all
    others are complete.
    """
    from pipelines.prediction import distributed
    from pipelines.prediction.interface import load_model
    from pipelines.prediction.render import print_results
    from pipelines.prediction.result import to_json, write_csv
    from pipelines.prediction.workflow import PredictError, find_profiles
    from pipelines.report.output import check_output, write_figures

    if as_json and as_csv:
        raise PredictError("Give --json or --csv, not both.")
    progress = not (as_json or as_csv)
    paths = find_profiles(files)
    for output in (plot, page):
        check_output(output)
    loaded = load_model(
        model,
        tracking=tracking,
        store=store,
        use_library=len(paths) <= distributed.MAX_LOCAL_FILES if library is None else library,
        progress=progress,
    )
    results, profiles, failures = distributed.predict_anywhere(
        paths, profile, loaded, cluster, refine=refine, draw=bool(plot or page)
    )
    if as_json:
        print(json.dumps([to_json(result) for result in results], indent=2, ensure_ascii=False))
    elif as_csv:
        write_csv(results, sys.stdout)
    elif results:
        print_results(results)
        say(f"Model {loaded.version.uri}, trained on {loaded.predictor.provenance.data.tag}")
    if profiles:
        write_figures(profiles, loaded.predictor, plot, page, total=len(results))
    if profile.instrument is None and results and progress:
        again = command_line("predict", files[0], "--instrument", "YOURS.instprm")
        next_commands((again, "predict with the measurement's own calibration"))
    distributed.raise_failures(failures, len(paths))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
