"""Compare the fast simulator with GSAS-II on random cells of your own campaign."""

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, run, say


def main(
    campaign: options.CampaignOption = options.DEFAULT_CAMPAIGN,
    cells: Annotated[int, Option(min=1, help="Random cells of each phase.")] = 30,
    seed: Annotated[int, Option(min=0, help="Seed of the random choice.")] = 0,
    workers: options.WorkersOption = None,
    png: Annotated[Path, Option(metavar="FILE", help="Figure.")] = Path("compare_simulators.png"),
    yes: options.YesOption = False,
    *,
    gsas2: options.Gsas2Command,
) -> None:
    """Compare the fast simulator with GSAS-II on random cells of a campaign.

    The table shows how far the two differ on your structures and your instrument, and how long they
    take; the figure shows the samples with the smallest and the largest difference.
    """
    import numpy as np

    from bragg_data.campaign import load_campaign
    from pipelines.simulation import comparison
    from pipelines.simulation.simulators import gsas2_options

    loaded = load_campaign(campaign)
    options.check_writable(png)
    samples = comparison.draw_cells(loaded, cells, np.random.default_rng(seed))
    where = gsas2_options(gsas2.gsas2_path, gsas2.pattern_limit)
    result = comparison.compare(loaded, samples, where, workers=workers, yes=yes)
    comparison.print_table(loaded, result)
    comparison.draw_extremes(loaded, result, png)
    worst = int(np.argmax(result.maximum))
    say(
        f"Largest difference: {result.maximum[worst]:.1e} of the maximum, at "
        f"{comparison.cell_text(loaded, samples, worst)}"
    )
    say(f"Drawn: the best and the worst of {len(samples)} patterns in {escape(str(png))}")
    simulate = "simulate", "--campaign", campaign, "--simulator"
    next_commands(
        (command_line(*simulate, "kinematic"), "simulate the campaign with the fast simulator"),
        (command_line(*simulate, "gsas2"), "or with GSAS-II"),
    )


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
