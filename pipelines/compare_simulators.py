"""Compare the fast simulator with GSAS-II on random cells of your own campaign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.cli.console import next_commands, run, say
from pipelines.cli.options import (
    DEFAULT_CAMPAIGN,
    CampaignOption,
    Gsas2Command,
    YesOption,
    command_line,
    expand_options,
)

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def main(
    campaign: CampaignOption = DEFAULT_CAMPAIGN,
    cells: Annotated[int, typer.Option(min=1, help="Random cells of each phase.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choice.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    png: Annotated[Path, typer.Option(metavar="FILE", help="Figure to write.")] = Path(
        "compare_simulators.png"
    ),
    yes: YesOption = False,
    *,
    gsas2: Gsas2Command,
) -> None:
    """Compare the fast simulator with GSAS-II on random cells of a campaign.

    The table shows how far the two differ on your structures and your instrument, and how long they
    take; the figure shows the samples with the smallest and the largest difference.
    """
    import numpy as np

    from bragg_data.campaign import load_campaign
    from pipelines.simulation import comparison
    from pipelines.simulation.simulator_choice import gsas2_options
    from pipelines.simulation.worker import SimulationError

    loaded = load_campaign(campaign)
    if png.is_dir() or not png.parent.is_dir():
        raise SimulationError(f"{png} cannot be written: name a file in a directory that exists.")
    samples = comparison.draw_cells(loaded, cells, np.random.default_rng(seed))
    options = gsas2_options(gsas2.gsas2_path, gsas2.pattern_limit)
    result = comparison.compare(loaded, samples, options, workers=workers, yes=yes)
    comparison.print_table(loaded, result)
    comparison.draw_extremes(loaded, result, png)
    worst = int(np.argmax(result.maximum))
    say(
        f"Largest difference: {result.maximum[worst]:.1e} of the maximum, at "
        f"{comparison.cell_text(loaded, samples, worst)}"
    )
    say(f"Drawn: the best and the worst of {len(samples)} patterns in {escape(str(png))}")
    explanations = {
        "kinematic": "simulate the campaign with the fast simulator",
        "gsas2": "or with GSAS-II",
    }
    next_commands(
        (command_line("simulate", "--simulator", name, "--campaign", campaign), text)
        for name, text in explanations.items()
    )


if __name__ == "__main__":
    run(app)
