"""Simulate a campaign into the versioned store, or a list of cells into a file."""

import time
from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from rich.markup import escape
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, duration, next_commands, run, say

_CELLS = "Cells instead of a campaign"


def main(
    campaign: options.CampaignOption = options.DEFAULT_CAMPAIGN,
    simulator: Annotated[
        str, Option(metavar="auto|gsas2|kinematic", help="kinematic is fast; auto prefers gsas2.")
    ] = "auto",
    store: options.StoreOption = options.DEFAULT_URI,
    tag: options.TagOption = None,
    limit: Annotated[int | None, Option(min=1, help="Only the first samples.")] = None,
    yes: options.YesOption = False,
    dry_run: Annotated[
        bool, Option(help="Print blocks, core-hours, disk and SLURM's script, and begin nothing.")
    ] = False,
    cells: Annotated[
        Path | None,
        Option(
            metavar="CELLS.csv",
            rich_help_panel=_CELLS,
            help="Columns crystal_system, a, b, c, alpha, beta, gamma, optionally phase.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(metavar="PATTERNS.nc", rich_help_panel=_CELLS, help="NetCDF file to write."),
    ] = None,
    *,
    gsas2: options.Gsas2Command,
    cluster: options.ClusterOptions,
) -> None:
    """Simulate a campaign into the versioned store, or a list of cells into a file.

    Whatever interrupts it, the same command completes exactly what is missing. With GSAS-II,
    patterns that other data sets of the store have are copied.
    """
    from bragg_data.campaign import load_campaign
    from bragg_data.store.repository import Store
    from pipelines.simulation import campaign as simulation
    from pipelines.simulation.simulators import SimulationError, gsas2_options

    began = time.monotonic()
    where = gsas2_options(gsas2.gsas2_path, gsas2.pattern_limit)
    loaded = load_campaign(campaign)
    job = simulation.SimulationJob(loaded, simulator, tag, limit, where, cluster, confirmed=yes)
    if dry_run:
        from pipelines.simulation.dry_run import print_dry_run

        print_dry_run(job)
        return
    if cells or out:
        if cells is None or out is None:
            raise SimulationError("--cells CELLS.csv and --out PATTERNS.nc belong together.")
        changed = {
            "--cluster": cluster.cluster != "local",
            "--limit": limit is not None,
            "--store": store != options.DEFAULT_URI,
            "--tag": tag is not None,
            "--workers": cluster.workers is not None,
        }
        if unused := [name for name, given in changed.items() if given]:
            raise SimulationError(
                f"--cells computes in this process and into --out alone: omit {', '.join(unused)}."
            )
        count = simulation.simulate_cells(cells, out, job)
        size, seconds = decimal(out.stat().st_size), duration(time.monotonic() - began)
        say(f"Written: {count:,} patterns in {escape(str(out))}, {size}, in {seconds}")
        return
    repository = Store(store, create=True)
    snapshot = simulation.simulate_campaign(job, repository)
    simulation.print_data_set(repository, snapshot, time.monotonic() - began)
    inspect = command_line("inspect", snapshot.name, "--png", "patterns.png", store=store)
    next_commands(
        (inspect, "see what is in it, with pictures of some patterns"),
        (command_line("train", store=store), "train a model on it"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
