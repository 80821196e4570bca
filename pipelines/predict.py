"""Predict crystal system and cell of measured profiles with a registered model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import errors, print_json, run, say
from pipelines.cli.refinement_options import OtherPhasesOption, SameSampleOption

if TYPE_CHECKING:
    from bragg_models.predictors import Predictor
    from pipelines.prediction.workflow import PredictedProfile

_CLUSTER = options.ClusterOptions(cluster=None)  # this process for few files


def main(
    files: Annotated[
        list[Path],
        Argument(
            metavar="FILE...",
            help="Profiles, and folders of them: GSAS files (.gsa .gss .fxye), columns of TOF, d "
            "or Q, intensity, sigma (.xye .xy .dat), NeXus (.nxs .h5), powder CIFs.",
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
            help="Find the most similar stored patterns, too; by default for up to 100 files.",
        ),
    ] = None,
    refine: Annotated[
        bool,
        Option(
            "--refine",
            help="Refine cell, displacement factor and broadening of each plausible phase.",
        ),
    ] = False,
    phases: OtherPhasesOption = None,
    same_sample: SameSampleOption = False,
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
    record: options.RecordOption = None,
    cluster: options.ClusterOptions = _CLUSTER,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Predict crystal system and cell parameters of measured profiles.

    The registered champion predicts, and before there is one the packaged model (BaTiO₃ on NOMAD);
    of models for several banks (--model models:/X-bank*-measured@champion) each its bank's profile,
    and the predictions are combined. The library match is the stored pattern that correlates best
    with the profile, of each crystal system, and on noisy profiles the better guide as long as the
    model was trained on clean ones. With --refine every phase is fitted to the whole pattern; where
    no structure of the model explains the peaks, lattices are fitted to their positions alone, the
    prediction is not accepted, and mixtures of the model's phases, and of those of --phases, are
    tried. More than 100 files are predicted by the workers of a cluster, by default of this
    machine. A file that cannot be read is named at the end.
    """
    from pipelines.prediction.files import check_recordable, check_request, find_profiles

    unused, twice = None if refine else phases, as_json and as_csv
    check_request(two_formats=twice, unused_phases=unused, instrument=profile.instrument)
    check_recordable(record, elsewhere=bool(cluster.cluster or phases))
    paths = find_profiles(files)
    options.check_writable(plot, page)
    from pipelines.prediction import distributed
    from pipelines.prediction.interface import load_models
    from pipelines.prediction.render import print_next, print_results, write_csv
    from pipelines.prediction.result import to_json
    from pipelines.recording.recorded_files import FilesRecorder
    from pipelines.refinement.inputs import read_known_structures

    progress = not (as_json or as_csv)
    use = False if library is None and len(paths) > distributed.MAX_LOCAL_FILES else library
    loaded = load_models(model, tracking=tracking, store=store, use_library=use, progress=progress)
    further = read_known_structures(phases)[0] if phases else ()
    how = {"refine": refine, "same_sample": same_sample}
    recorder = None if record is None else FilesRecorder(record, paths, profile, loaded, **how)
    results, profiles, failures = distributed.predict_with_lineage(
        paths, profile, loaded, cluster, further=further, draw=bool(plot or page), **how
    )
    results = results if recorder is None else recorder.add(results, profiles)
    if as_json:
        print_json([to_json(result) for result in results])
    elif as_csv:
        write_csv(results, sys.stdout)
    elif results:
        print_results(results)
        for of_bank in loaded:
            say(f"Model {of_bank.version.uri}, trained on {of_bank.predictor.provenance.data.tag}")
    if profiles:
        _write_figures(profiles, [m.predictor for m in loaded], plot, page, len(results))
    if progress:
        print_next(files[0], profile.instrument, results)
    distributed.raise_failures(failures, len(paths))


def _write_figures(
    profiles: Sequence[PredictedProfile],
    predictors: Sequence[Predictor],
    plot: Path | None,
    page: Path | None,
    total: int,
) -> None:
    """Write an image and an HTML report, if named, of the first of ``total`` predictions."""
    written = []
    if plot is not None:
        from pipelines.prediction.figures import MAX_PANELS, prediction_figure

        prediction_figure(profiles).savefig(plot, dpi=130)
        written.append(("Drawn in", plot, MAX_PANELS))
    if page is not None:
        from pipelines.report.page import MAX_SECTIONS, render_report

        text = render_report(profiles, *predictors, total=total)
        page.write_text(text, encoding="utf-8", errors="replace")
        written.append(("Report in", page, MAX_SECTIONS))
    for what, path, most in written:
        part = f" (the first {most})" if total > most else ""
        errors.print(f"{what} [bold]{escape(str(path))}[/]{part}", soft_wrap=True)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
