"""Compute recorded answers again, bit by bit, or name what has changed since."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import print_json, run, say


def main(
    record: Annotated[Path, Option(metavar="FOLDER", help="The record of bragg serve.")],
    ids: Annotated[
        list[str] | None, Argument(metavar="ID...", help="Of answers, or of whole requests.")
    ] = None,
    last: Annotated[int, Option(min=0, help="The newest answers of the record, too.")] = 0,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    as_json: options.JsonOption = False,
) -> None:
    """Compute answers again, from the registry, the store and the input that the record holds.

    An answer that is the same has the same bits. Of any other, it is named what is not as it was:
    files of the model (weights, campaign, CIFs), the snapshot, libraries, processor, code. The exit
    code is 1 unless all answers are the same.
    """
    import statistics

    from catalog.tracking import open_existing
    from pipelines.recording.record import Record, RecordError
    from pipelines.service.replay import Replayer

    if not ids and not last:
        raise RecordError("Name answers by their ids, or the newest with --last N.")
    opened = Record(record)
    answers = [answer for name in ids or () for answer in opened.find(name)]
    answers += opened.answers(last) if last else []
    replayer = Replayer(opened, open_existing(tracking))
    replays = [replayer.replay(answer) for answer in answers]
    same = sum(replay.same is True for replay in replays)
    median = statistics.median(replay.seconds for replay in replays) if replays else 0.0
    if as_json:
        of_each = [replay.to_json() for replay in replays]
        print_json({"replayed": len(replays), "same": same, "seconds": median, "answers": of_each})
    else:
        for replay in replays:
            result = {True: "the same", False: "[red]differs[/]", None: "[red]not computed[/]"}
            say(f"{replay.id}  {result[replay.same]}")
            for line in (*replay.differences, *(f"changed: {c}" for c in replay.changed)):
                say(f"  {escape(line)}")
        say(f"{same} of {len(replays)} answers are the same, bit by bit; median {median:.3f} s")
    raise typer.Exit(0 if same == len(replays) else 1)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
