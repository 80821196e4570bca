"""Serve the champion over HTTP: profiles or files in, JSON out; a new champion needs no restart."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from pipelines.cli import options
from pipelines.cli.console import check_can_listen, errors, next_commands, run, say


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
    record_limit: options.RecordLimitOption = None,
    workers: Annotated[
        int, Option(min=0, max=64, help="Processes for refinements; without any none are made.")
    ] = 1,
    time_limit: Annotated[
        float, Option(min=0.1, metavar="SECONDS", help="For the refinement of a profile.")
    ] = 10.0,
    phases: Annotated[
        list[Path] | None,
        Option(
            metavar="PLACE",
            help="Structures that requests may have samples searched for: a folder of CIFs, a "
            "campaign file or a CIF (repeatable).",
        ),
    ] = None,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Serve a registered model over HTTP, before there is one the packaged one; Ctrl-C stops it.

    POST /predict takes profiles on the model's grid, POST /predict/file the text of a measured
    file, or the files of a sample, which it refines on request. GET /model describes grid, phases
    and units, /health and /ready the state of the service, /openapi.json and /docs its interface,
    /metrics what it does. Every response names its model version, and each request is a line of
    standard error. With --record answers get an id, by which bragg replay computes them again, and
    bragg monitor watches for drift. An address that other machines reach needs tokens.
    """
    import torch
    import uvicorn

    from catalog.lineage_events import LineageRun
    from catalog.registry import lineage_of
    from catalog.tracking import open_existing
    from pipelines.recording.record import Record
    from pipelines.refinement.inputs import read_known_structures
    from pipelines.registry.packages import versions_that_predict
    from pipelines.service.app import create_app
    from pipelines.service.gate import (
        DRAIN_SECONDS,
        PunctualServer,
        TimedProtocol,
        local_address,
        log_requests,
        rules_of,
    )
    from pipelines.service.refining import RefinementWorkers, Setup

    rules = rules_of(host, allowed_host or (), token_file, max_bytes=int(1e6 * max_megabytes))
    check_can_listen(host, port)
    database = open_existing(tracking)
    versions = versions_that_predict(database, model)
    searched, problems = read_known_structures(phases) if phases else ([], [])
    # Arrays are small: on cores that others use, too, two threads take five times as long as one.
    torch.set_num_threads(threads)
    address = local_address(host, port)
    names = ", ".join(f"{v.uri} ({v.tags.get('model', 'model')})" for v in versions)
    say(f"Serving {names} on {address}")
    for problem in problems:
        errors.print(problem, markup=False, soft_wrap=True)
    curl = "curl"
    if token_file is not None:
        curl += f' --header "Authorization: Bearer $(head -1 {shlex.quote(str(token_file))})"'
    next_commands(
        (f"{curl} {address}/ready", "the model version"),
        (f"{curl} {address}/openapi.json", "the interface"),
        *([(f"bragg monitor --record {record}", "watch for drift")] if record else []),
    )
    log_requests()
    service = create_app(
        database or tracking,
        model,
        refresh_seconds=refresh,
        rules=rules,
        record=None if record is None else Record(record, record_limit, create=True),
        workers=RefinementWorkers(workers, Setup(tuple(searched), time_limit)),
    )
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
    where = database.uri if database else tracking
    with LineageRun("serve", [lineage_of(where, version) for version in versions]):
        PunctualServer(config).run()


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
