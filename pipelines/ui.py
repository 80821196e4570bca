"""Start the MLflow UI on this project's runs and models, on this machine only."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated

import typer

from pipelines.cli.console import run, say
from pipelines.cli.options import DEFAULT_TRACKING_URI, TrackingOption

app = typer.Typer(add_completion=False)

_DEFAULT = "0"  # the experiment that MLflow makes by itself


class UiError(RuntimeError):
    """A user interface that cannot be started."""


@app.command()
def main(
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port on localhost.")] = 5000,
    tracking: TrackingOption = DEFAULT_TRACKING_URI,
) -> None:
    """Start the MLflow UI and print its address; Ctrl-C stops it."""
    from catalog.experiment_view import configure_experiment, experiment_url
    from catalog.tracking import Tracking

    place = Tracking(tracking)
    served = place.uri.startswith("sqlite:///")
    address = f"http://127.0.0.1:{port}" if served else place.uri
    found = [one for one in place.client.search_experiments() if one.experiment_id != _DEFAULT]
    say(f"MLflow UI on {place.uri}" if served else f"The runs are on a server: {place.uri}")
    for one in found:
        configure_experiment(place, one.experiment_id)
        say(f"Models of {one.name}: [bold]{experiment_url(address, one.experiment_id)}[/]")
    if not served:
        return
    say(f"Open [bold]{address}[/] (Ctrl-C stops it)")
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", place.uri,
    ]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": place.uri,
    }
    server = subprocess.Popen(command, env=environment)
    try:
        code = server.wait()
    except KeyboardInterrupt:
        code = 0
    finally:
        server.terminate()
        server.wait()
    if code:
        raise UiError(
            f"The MLflow server ended with code {code}. If the port is taken, name another: "
            f"python -m pipelines.ui --port {port + 1}"
        )


if __name__ == "__main__":
    run(app)
