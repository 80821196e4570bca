"""Serve the champion over HTTP: profiles or files in, JSON out; a new champion needs no restart."""

from pathlib import Path
from typing import Annotated

from typer import Option

from pipelines.cli import options
from pipelines.cli.console import check_can_listen, next_commands, run, say


def main(
    model: options.ModelOption = None,
    host: Annotated[str, Option(help="Address; others are open to the network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    refresh: Annotated[float, Option(min=0.1, help="Seconds between looks for a champion.")] = 5.0,
    max_megabytes: Annotated[float, Option(min=0.001, help="Size of the longest request.")] = 32.0,
    allowed_host: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Host name under which it is reached; again for more."),
    ] = None,
    token_file: Annotated[
        Path | None,
        Option(
            envvar="BRAGG_SERVICE_TOKENS",
            exists=True,
            dir_okay=False,
            help="File of tokens, one a line, one of which every request has to send.",
        ),
    ] = None,
    threads: Annotated[int, Option(min=1, help="Threads; more help on idle cores alone.")] = 1,
    record: options.RecordOption = None,
    record_limit: options.RecordLimitOption = options.RECORD_MEGABYTES,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Serve a registered model over HTTP, before there is one the packaged one; Ctrl-C stops it.

    POST /predict takes profiles on the model's grid, POST /predict/file the text of a measured
    file. GET /model describes grid, phases and units, /health and /ready the state of the service,
    /openapi.json and /docs its interface, /metrics what it does. Every response names its model
    version, and each request is a line of standard error. With --record every answer gets an id,
    by which bragg replay computes it again, and bragg monitor watches for drift. An address that
    other machines reach needs tokens.
    """
    import torch
    import uvicorn

    from catalog.lineage_events import LineageRun
    from catalog.registry import lineage_of
    from catalog.tracking import open_existing
    from pipelines.prediction.gate import DRAIN_SECONDS, TimedProtocol, log_requests, rules_of
    from pipelines.prediction.record import Record
    from pipelines.prediction.service import create_app
    from pipelines.registry.packages import version_that_predicts

    rules = rules_of(host, allowed_host or (), token_file, max_bytes=int(1e6 * max_megabytes))
    check_can_listen(host, port)
    database = open_existing(tracking)
    version = version_that_predicts(database, model)
    # Arrays are small: on cores that others use, too, two threads take five times as long as one.
    torch.set_num_threads(threads)
    say(f"Serving {version.uri} ({version.tags.get('model', 'model')}) on http://{host}:{port}")
    next_commands(
        (f"curl http://{host}:{port}/ready", "the model version"),
        (f"curl http://{host}:{port}/openapi.json", "the interface"),
        *([(f"bragg monitor --record {record}", "watch for drift")] if record else []),
    )
    log_requests()
    answers = None if record is None else Record(record, record_limit, create=True)
    place = database or tracking
    service = create_app(place, model, refresh_seconds=refresh, rules=rules, record=answers)
    config = uvicorn.Config(
        service,
        host,
        port,
        http=TimedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    with LineageRun("serve", [lineage_of(database.uri if database else tracking, version)]):
        uvicorn.Server(config).run()


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
