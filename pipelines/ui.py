"""Start the MLflow UI on this project's runs and models, on this machine only."""

import os
import sys
from typing import Annotated

from typer import Option

from pipelines.cli import options
from pipelines.cli.console import check_can_listen, run, say


def main(
    port: Annotated[int, Option(min=1024, max=65535, help="Port on localhost.")] = 5000,
    tracking: options.TrackingOption = options.DEFAULT_TRACKING_URI,
) -> None:
    """Start the MLflow UI and print its address; Ctrl-C stops it."""
    from catalog.experiment_view import configure_experiment, experiment_url, project_experiments
    from catalog.tracking import SERVER_SETTINGS, Tracking

    place = Tracking(tracking)
    is_server = not place.uri.startswith("sqlite:///")
    address = place.uri if is_server else f"http://127.0.0.1:{port}"
    say(f"The runs are on a server: {place.uri}" if is_server else f"MLflow UI on {place.uri}")
    for name, experiment_id in project_experiments(place).items():
        configure_experiment(place, experiment_id)
        say(f"Models of {name}: [bold]{experiment_url(address, experiment_id)}[/]")
    if is_server:
        return
    check_can_listen("127.0.0.1", port)
    say(f"Open [bold]{address}[/] (Ctrl-C stops it)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    # One process serves one person: MLflow's four take four times the memory, and longer to start.
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", place.uri]
    environment = os.environ | SERVER_SETTINGS | {"MLFLOW_TRACKING_URI": place.uri}
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
