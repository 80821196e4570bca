"""The MLflow server of a team: serve runs and models, back them up, restore a backup."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from typer import Argument, Option

from pipelines.cli.console import Progress, check_can_listen, next_commands, run, say

app = typer.Typer(add_completion=False, no_args_is_help=True)

HomeOption = Annotated[
    Path,
    Option(
        envvar="BRAGG_MLFLOW_HOME",
        metavar="DIR",
        help="Directory of the files, and of the database if it is sqlite.",
    ),
]
BackendOption = Annotated[
    str | None,
    Option(
        envvar="BRAGG_MLFLOW_BACKEND",
        metavar="URI",
        help="postgresql://USER@HOST/DATABASE; by default sqlite in DIR. A password belongs into "
        "PostgreSQL's password file (~/.pgpass) or the environment.",
    ),
]


@app.callback()
def _main() -> None:
    """Run the MLflow server of a team, back it up, restore it.

    Users set MLFLOW_TRACKING_URI to its address, nothing else.
    """


@app.command()
def serve(
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
    host: Annotated[str, Option(help="Address; others are open to the network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    workers: Annotated[int, Option(min=1, help="Number of server processes.")] = 4,
    allowed_hosts: Annotated[
        str | None, Option(metavar="NAMES", help="Host names of the server, separated by commas.")
    ] = None,
) -> None:
    """Serve runs, models and their files; Ctrl-C stops it.

    Files go through the server, so that nobody needs the database or the directory.
    """
    from sqlalchemy.engine import make_url

    from catalog.backup import ARTIFACTS, backend_uri, prepare_home
    from catalog.tracking import SERVER_SETTINGS

    uri = backend_uri(home, backend)
    prepare_home(home, uri)
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", host, "--port", str(port), "--workers", str(workers)]
    command += ["--serve-artifacts", "--artifacts-destination"]
    command += [(home.absolute() / ARTIFACTS).as_uri()]
    if allowed_hosts is not None:
        command += ["--allowed-hosts", allowed_hosts]
    check_can_listen(host, port)
    say(f"MLflow on [bold]http://{host}:{port}[/], runs in {make_url(uri)!r}, files in {home}")
    address = f"http://{host}:{port}"
    next_commands((f"export MLFLOW_TRACKING_URI={address}", "the setting of all commands"))
    sys.stdout.flush()
    # Not on the command line, where everybody on the machine could read it.
    environment = os.environ | SERVER_SETTINGS | {"MLFLOW_BACKEND_STORE_URI": uri}
    environment.pop("MLFLOW_TRACKING_URI", None)
    os.execve(sys.executable, command, environment)


@app.command()
def backup(
    into: Annotated[Path, Argument(metavar="DIR", help="Where backups are collected.")],
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
) -> None:
    """Copy database and files into a new directory of DIR, while the server runs."""
    from catalog.backup import ARTIFACTS, backend_uri, create_backup, files_of

    uri = backend_uri(home, backend)
    with Progress("Copying", len(files_of(home / ARTIFACTS)), "files") as progress:
        directory, new = create_backup(into, home, uri, progress.advance)
    say(f"[bold]{directory}[/]: {new.database}, {new.artifacts:,} files, {decimal(new.bytes)}")
    test = f"python -m pipelines.tracking_server restore {directory} --home NEW"
    next_commands((test, "test it: fill another server's directory from the backup"))


@app.command()
def restore(
    backup: Annotated[Path, Argument(metavar="BACKUP", help="A directory of backup.")],
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
) -> None:
    """Fill an empty DIR, and an empty database, from a backup. Nothing is overwritten."""
    from sqlalchemy.engine import make_url

    from catalog.backup import ARTIFACTS, backend_uri, files_of, restore_backup

    uri = backend_uri(home, backend)
    with Progress("Copying", len(files_of(backup / ARTIFACTS)), "files") as progress:
        restored = restore_backup(backup, home, uri, progress.advance)
    say(
        f"[bold]{home}[/]: {restored.database} of {restored.created_at}, {restored.artifacts:,} "
        f"files, {decimal(restored.bytes)}"
    )
    options = f" --home {home}" + ("" if backend is None else f" --backend {make_url(uri)!r}")
    next_commands((f"python -m pipelines.tracking_server serve{options}", "serve it"))


if __name__ == "__main__":
    run(app)
