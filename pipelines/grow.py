"""Let a data set grow where a model is weak: draw further samples, and simulate only these."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say


def main(
    campaign: Annotated[str, Argument(metavar="NAME|FILE.toml", help="The campaign.")],
    where: Annotated[
        str,
        Option(
            metavar="random|uncertain|wrong|measured",
            help="Where samples are drawn: anywhere; where the model's intervals are wide or its "
            "cells do not explain the patterns; where its cells are wrong; near --profiles.",
        ),
    ] = "uncertain",
    samples: Annotated[
        int | None, Option(min=1, help="How many samples join.", show_default="1000")
    ] = None,
    budget: Annotated[
        float | None,
        Option(metavar="MIN", help="As many samples as these minutes allow, from timed ones."),
    ] = None,
    profiles: Annotated[
        list[Path] | None, Option(metavar="FILE", help="Measured profiles; again for more.")
    ] = None,
    instrument: Annotated[
        Path | None, Option(metavar="FILE.instprm", help="Calibration of the profiles.")
    ] = None,
    model: options.ModelOption = None,
    seed: Annotated[int, Option(min=0, help="Seed of candidates and choice.")] = 0,
    data: Annotated[
        str | None, Option(metavar="TAG", help="Data set that grows; by default the newest.")
    ] = None,
    store: options.StoreOption = options.DEFAULT_URI,
    tag: options.TagOption = None,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    yes: options.YesOption = False,
    *,
    gsas2: options.Gsas2Command,
    cluster: options.ClusterOptions,
) -> None:
    """Let a data set grow where a model is weak: draw further samples, and simulate only these.

    Candidates are drawn from the campaign's ranges and rated by the model (without --model the
    champion) on patterns of the fast simulator; those that are chosen are simulated by the data
    set's own simulator. The result is a new tag, which shares the chunks of the old one; that
    stays as it is, and so do its test samples. Whatever interrupts it, the same command completes
    what is missing.
    """
    from bragg_data.campaign import load_campaign
    from bragg_data.store.repository import Store
    from pipelines.prediction.interface import load_model
    from pipelines.simulation import growth
    from pipelines.simulation.campaign import SimulationJob, print_data_set, simulate_campaign
    from pipelines.simulation.simulators import SimulationError, gsas2_options

    began = time.monotonic()
    if budget is not None and (samples is not None or not 0 < budget < math.inf):
        raise SimulationError("Give --samples N, or --budget MIN with MIN above 0.")
    count = 0 if budget else samples or 1000
    location = gsas2_options(gsas2.gsas2_path, gsas2.pattern_limit)
    loaded, repository, files = load_campaign(campaign), Store(store), list(profiles or ())
    request = growth.GrowthRequest(where, count, seed, profiles=growth.profiles_hash(files))
    rater = None
    if model is not None and where in growth.MODEL_RULES:
        rater = load_model(model, tracking=tracking, use_library=False)
        request = request.rated_by(rater.version.uri, rater.version.run_id)
    grown = growth.begun_growth(repository, loaded, request, data)
    if grown is None:
        parent, measured = growth.parent_of(repository, loaded, data), None
        if rater is None and where in growth.MODEL_RULES:
            rater = load_model(None, tracking=tracking, use_library=False)
            request = request.rated_by(rater.version.uri, rater.version.run_id)
        if files and rater is not None:
            from pipelines.prediction.workflow import measured_cells

            measured = measured_cells(files, options.ProfileOptions(instrument), rater)
        predictor = None if rater is None else rater.predictor
        if budget:
            count = growth.samples_within(
                budget, parent, request, predictor, gsas2=location, cluster=cluster
            )
            say(f"{count:,} samples fit into {budget:g} minutes, from timed ones")
        grown = growth.grown_campaign(parent, replace(request, samples=count), predictor, measured)
        by = f", by {request.model}" if request.model else ""
        say(f"{parent.attrs['tag']} grows by {count:,} samples: {where}{by}")
    else:
        say(f"{grown.growths[-1].parent} was begun to grow by this command: it goes on")
    simulator = str(repository.open(grown.growths[-1].parent).attrs["simulator"])
    job = SimulationJob(grown, simulator, tag, None, location, cluster, confirmed=yes)
    snapshot = simulate_campaign(job, repository)
    print_data_set(repository, snapshot, time.monotonic() - began)
    train = command_line("train", "--data", snapshot.name, store=store, tracking=tracking)
    next_commands((train, "train a model on it; its test samples are those of before"))


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
