"""React to drift: train on what changed, and promote the new version if it passes the gate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, duration, next_commands, print_json, run, say


def main(
    record: Annotated[Path, Option(metavar="FOLDER", help="The record of bragg serve.")],
    model: options.ModelOption = None,
    samples: Annotated[
        int, Option(min=200, help="Of a delta campaign, which another difC needs.")
    ] = 2000,
    state: Annotated[Path, Option(help="Of the training.")] = Path("data/training"),
    store: options.StoreOption = options.DEFAULT_URI,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    dry_run: Annotated[bool, Option("--dry-run", help="State what would be done.")] = False,
    as_json: options.JsonOption = False,
    *,
    watching: options.WatchOptions,
    cluster: options.ClusterOptions,
) -> None:
    """Turn the alarms of bragg monitor into a new champion, without a question.

    A shift of known cells becomes a new difC, broader peaks and higher backgrounds become other
    measurement effects; where patterns change, a delta campaign is simulated. A model of the
    champion's kind goes on from its weights, is tested on held-out draws, and becomes the champion
    if it passes the gate of bragg promote and accepts the recorded profiles since the drift.
    Otherwise the reasons are stated, and the champion stays. The exit code is 0 if there was
    nothing to do, or a version was promoted.
    """
    import contextlib
    import sys

    from catalog.tracking import open_existing
    from pipelines.monitoring.monitor import observe
    from pipelines.monitoring.reaction import ReactionPlaces, react
    from pipelines.recording.record import Record

    opened = Record(record)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        seen = observe(opened, open_existing(tracking), model, watching)
        places = ReactionPlaces(store, tracking, state, cluster, samples)
        reaction = react(seen, opened, places, dry_run=dry_run)
    if as_json:
        print_json(reaction.to_json())
    else:
        for line in reaction.lines():
            say(escape(line))
        say(f"After {duration(reaction.seconds)}")
        if reaction.promoted and reaction.candidate is not None:
            name = reaction.candidate.split("/")[1]
            back = command_line("promote", name, "--rollback", tracking=tracking)
            lineage = command_line("lineage", reaction.candidate, tracking=tracking)
            next_commands((lineage, "where it comes from"), (back, "take it back"))
    done = reaction.promoted or not reaction.alarms or (dry_run and not reaction.objections)
    raise typer.Exit(0 if done else 1)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
