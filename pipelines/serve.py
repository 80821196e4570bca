"""Serve the champion over HTTP: profiles or files in, JSON out; a new champion needs no restart."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
import uvicorn

from catalog import registry
from catalog.tracking import DEFAULT_TRACKING_URI, Tracking
from pipelines.cli.console import next_commands, run, say
from pipelines.prediction.service import create_app

app = typer.Typer(add_completion=False)


class ServeError(RuntimeError):
    """A service that cannot be started."""


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option(metavar="URI", help="models:/NAME@ALIAS; the only champion if left out."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's are open to all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    refresh: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a new champion is looked for.")
    ] = 5.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Longest request.")] = 32.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model; by default one per core.")
    ] = None,
    tracking: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
    ] = DEFAULT_TRACKING_URI,
) -> None:
    """Serve a registered model over HTTP; Ctrl-C stops it.

    POST /predict takes profiles on the model's grid, POST /predict/file the text of a measured
    file; GET /model tells grid, phases and units, /health and /ready how it is, /openapi.json and
    /docs what can be asked. Every answer names the model version that gave it.
    """
    place = Tracking(tracking)
    found = registry.find(place, model or registry.champion_uri(place))
    if threads is not None:
        torch.set_num_threads(threads)
    say(f"Serving {found.uri} ({found.tags.get('model', 'model')}) on http://{host}:{port}")
    next_commands(
        [
            (f"curl http://{host}:{port}/ready", "who answers"),
            (f"curl http://{host}:{port}/openapi.json", "what can be asked"),
        ]
    )
    service = create_app(place, model, refresh_seconds=refresh, max_bytes=int(1e6 * max_megabytes))
    server = uvicorn.Server(
        uvicorn.Config(service, host=host, port=port, log_level="warning", access_log=False)
    )
    try:
        server.run()
    except SystemExit as error:  # how uvicorn says that it cannot listen
        if server.started:
            raise
        raise ServeError(
            f"Nothing can listen on {host}:{port}: the port is taken, or the address is not this "
            f"machine's. Name another with --port."
        ) from error
    if not server.started:
        raise ServeError(f"The service did not start on {host}:{port}. Name another --port.")


if __name__ == "__main__":
    run(app)
