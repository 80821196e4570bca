"""Watch the answers of a service for drift: rejections, calibration, background and resolution."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer import Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, print_json, run, say


def main(
    record: Annotated[Path, Option(metavar="FOLDER", help="The record of bragg serve.")],
    model: options.ModelOption = None,
    page: Annotated[Path | None, Option(metavar="HTML", help="Write a page with charts.")] = None,
    webhook: Annotated[
        str | None, Option(metavar="URL", help="Post alarms as JSON, to this machine.")
    ] = None,
    webhook_host: Annotated[str | None, Option(help="Another machine that may get them.")] = None,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
    as_json: options.JsonOption = False,
    *,
    watching: options.WatchOptions,
) -> None:
    """Look for drift in what the answers of a model show, by default those of the newest one.

    Width of the peaks and background are compared with the model's first answers and with the
    measurement effects of its training; refined or predicted cells with those of --known samples,
    of which a common shift is that of difC; rejections with the model's test. The exit code is 1 if
    there is an alarm, so that a timer can call bragg react.
    """
    from catalog.tracking import open_existing
    from pipelines.monitoring.monitor import check_webhook, observe, send_alarms
    from pipelines.recording.record import Record

    options.check_writable(page)
    if webhook is not None:
        check_webhook(webhook, webhook_host)
    seen = observe(Record(record), open_existing(tracking), model, watching)
    if page is not None:
        from pipelines.monitoring.page import render_monitor

        page.write_text(render_monitor(seen), encoding="utf-8")
    if webhook is not None and seen.alarms:
        send_alarms(webhook, seen, record)
    if as_json:
        print_json(seen.to_json())
    else:
        from pipelines.evaluation.tables import ResultTable

        title = f"{len(seen.signals):,} answers of {seen.version.uri}"
        table = ResultTable(title, ("signal", "answers", "last 50", "usual"))
        for row in seen.rows():
            table.add(*row)
        table.show()
        for alarm in seen.alarms:
            say(f"[red]Alarm:[/] {escape(alarm.text)}")
        say(f"Page in {page}" if page else "" if seen.alarms else "No alarm.")
        if seen.alarms:
            known_words = ("--known", watching.known) if watching.known else ()
            react = command_line("react", "--record", record, *known_words, tracking=tracking)
            next_commands((f"{react} --dry-run", "what would be done about it"))
    raise typer.Exit(1 if seen.alarms else 0)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
