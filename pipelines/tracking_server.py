"""The MLflow server of a team: serve runs and models, back them up, restore a backup."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from rich.filesize import decimal
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from bragg_data.errors import first_line
from pipelines.cli.console import Progress, next_commands, run, say

app = typer.Typer(add_completion=False, no_args_is_help=True)

_SQLITE = "sqlite:///"
_ARTIFACTS, _MANIFEST = "artifacts", "backup.json"
_MINE = 0o700  # runs and models are read through the server, not around it

HomeOption = Annotated[
    Path,
    typer.Option(
        envvar="BRAGG_MLFLOW_HOME", metavar="DIR",
        help="Where artifacts are, and the database if it is sqlite.",
    ),
]  # fmt: skip
BackendOption = Annotated[
    str | None,
    typer.Option(
        envvar="BRAGG_MLFLOW_BACKEND", metavar="URI",
        help="postgresql://USER@HOST/DATABASE; by default sqlite in DIR. A password belongs into "
        "PostgreSQL's password file (~/.pgpass) or the environment.",
    ),
]  # fmt: skip


class TrackingServerError(RuntimeError):
    """A server that cannot be started, or a backup that cannot be made or restored."""


@dataclass(frozen=True)
class Backup:
    """What a backup holds; its ``backup.json``.

    Attributes
    ----------
    made_at
        ISO 8601, UTC.
    database
        Name of the file with the database: ``database.sqlite`` or ``database.dump``.
    artifacts, bytes
        Files of runs and models, and their size.
    """

    made_at: str
    database: str
    artifacts: int
    bytes: int


def _backend(home: Path, backend: str | None) -> str:
    chosen = backend or f"{_SQLITE}{home.absolute() / 'mlflow.db'}"
    if not chosen.startswith((_SQLITE, "postgresql://")):
        raise TrackingServerError(
            f"'{chosen.partition(':')[0]}:' is no database that the server is run with. Give "
            f"postgresql://USER@HOST/DATABASE, or nothing for sqlite."
        )
    return chosen


def _prepare_sqlite(uri: str) -> None:
    from catalog.tracking import Tracking

    Tracking(uri)  # makes the tables, one process at a time
    with closing(sqlite3.connect(uri.removeprefix(_SQLITE))) as database:
        # Readers and a writer side by side; the setting stays with the file.
        database.execute("PRAGMA journal_mode=WAL")


@app.callback()
def _main() -> None:
    """Run the MLflow server of a team, back it up, restore it.

    Users set MLFLOW_TRACKING_URI to its address, nothing else.
    """


@app.command()
def serve(
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's are open to all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 4,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Names under which browsers and programs may ask, with commas."
        ),
    ] = None,
) -> None:
    """Serve runs, models and their files; Ctrl-C stops it.

    Files go through the server, so that nobody who trains or predicts needs the database or the
    directory.
    """
    uri = _backend(home, backend)
    with suppress(FileExistsError):
        home.mkdir(mode=_MINE, parents=True)
    if uri.startswith(_SQLITE):
        _prepare_sqlite(uri)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port),
        "--workers", str(workers), "--serve-artifacts",
        "--artifacts-destination", (home.absolute() / _ARTIFACTS).as_uri(),
    ]  # fmt: skip
    if allowed_hosts is not None:
        command += ["--allowed-hosts", allowed_hosts]
    say(f"MLflow on [bold]http://{host}:{port}[/], runs in {make_url(uri)!r}, files in {home}")
    next_commands(
        [(f"export MLFLOW_TRACKING_URI=http://{host}:{port}", "what the commands follow")]
    )
    sys.stdout.flush()
    environment = os.environ | {
        # Not on the command line, where everybody on the machine could read it.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    os.execve(sys.executable, command, environment)


@app.command()
def backup(
    into: Annotated[Path, typer.Argument(metavar="DIR", help="Where backups are collected.")],
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
) -> None:
    """Copy database and files into a new directory of DIR, while the server runs.

    The database comes first: what it names is among the files copied after it. The directory
    appears when it is complete.
    """
    uri = _backend(home, backend)
    now = datetime.now(UTC)
    done = into / f"mlflow-{now:%Y%m%dT%H%M%S%fZ}"
    into.mkdir(mode=_MINE, parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=into))
    try:
        database = _dump(uri, partial)
        files, size = _copied(home / _ARTIFACTS, partial / _ARTIFACTS)
        made = Backup(now.isoformat(timespec="seconds"), database, files, size)
        (partial / _MANIFEST).write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")
        partial.rename(done)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"[bold]{done}[/]: {database}, {files:,} files, {decimal(size)}")
    next_commands(
        [
            (
                f"python -m pipelines.tracking_server restore {done} --home NEW",
                "try it: a server from the backup, beside the running one",
            )
        ]
    )


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(metavar="BACKUP", help="A directory of backup.")],
    home: HomeOption = Path("mlflow"),
    backend: BackendOption = None,
) -> None:
    """Fill an empty DIR, and an empty database, from a backup. Nothing is overwritten."""
    try:
        held = Backup(**json.loads((backup / _MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrackingServerError(
            f"{backup} is no complete backup ({error}). Name a directory that backup printed."
        ) from error
    uri = _backend(home, backend)
    if uri.startswith(_SQLITE) != held.database.endswith("sqlite"):
        raise TrackingServerError(
            f"{backup} holds {held.database}, which cannot become a database at "
            f"{uri.partition(':')[0]}: restore it with the kind of backend that it was made from."
        )
    if home.exists() and any(home.iterdir()):
        raise TrackingServerError(f"{home} is not empty. Name a new directory with --home.")
    with suppress(FileExistsError):
        home.mkdir(mode=_MINE, parents=True)
    with FileLock(home / ".restore.lock", fallback_to_soft=False):
        _load(backup / held.database, uri)
        files, size = _copied(backup / _ARTIFACTS, home / _ARTIFACTS)
    (home / ".restore.lock").unlink(missing_ok=True)
    if (files, size) != (held.artifacts, held.bytes):
        raise TrackingServerError(
            f"{backup} held {held.artifacts} files of {held.bytes} bytes when it was made, and "
            f"holds {files} of {size} now. Take another backup."
        )
    say(f"[bold]{home}[/]: {held.database} of {held.made_at}, {files:,} files, {decimal(size)}")
    given = f" --home {home}" + ("" if backend is None else f" --backend {make_url(uri)!r}")
    next_commands([(f"python -m pipelines.tracking_server serve{given}", "serve it")])


def _dump(uri: str, into: Path) -> str:
    """Copy a database as it is at one moment; return the file's name."""
    if not uri.startswith(_SQLITE):
        _postgresql("pg_dump", "--format=custom", f"--file={into / 'database.dump'}", uri=uri)
        return "database.dump"
    source = Path(uri.removeprefix(_SQLITE))
    if not source.exists():
        raise TrackingServerError(f"There is no database {source}. Name the server's --home.")
    with (
        closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as database,
        closing(sqlite3.connect(into / "database.sqlite")) as copy,
    ):
        database.backup(copy)
    return "database.sqlite"


def _load(file: Path, uri: str) -> None:
    """Fill an empty database from a copy."""
    if uri.startswith(_SQLITE):
        shutil.copyfile(file, uri.removeprefix(_SQLITE))
        return
    engine = create_engine(uri)
    try:
        tables = inspect(engine).get_table_names()
    except SQLAlchemyError as error:
        reason = first_line(error)
        raise TrackingServerError(f"{make_url(uri)!r} cannot be used: {reason}") from error
    finally:
        engine.dispose()
    if tables:
        raise TrackingServerError(
            f"{make_url(uri)!r} is not empty: it has {len(tables)} tables. Make a new database."
        )
    _postgresql("pg_restore", "--no-owner", "--exit-on-error", str(file), uri=uri)


def _postgresql(program: str, *arguments: str, uri: str) -> None:
    """Run a program of PostgreSQL; the URI goes by its environment, so nobody reads it in ps."""
    url = make_url(uri)
    told = {"PGHOST": url.host, "PGUSER": url.username, "PGPASSWORD": url.password,
            "PGDATABASE": url.database, "PGPORT": url.port and str(url.port),
            **{f"PG{key.upper()}": str(value) for key, value in url.query.items()}}  # fmt: skip
    environment = os.environ | {name: value for name, value in told.items() if value}
    named = [f"--dbname={url.database}"] if program == "pg_restore" else []
    try:
        subprocess.run(
            [program, *named, *arguments], check=True, capture_output=True, text=True,
            env=environment,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise TrackingServerError(
            f"{program} is not installed: it belongs to PostgreSQL's client programs."
        ) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TrackingServerError(f"{program} failed on {url!r}: {reason}") from error


def _copied(source: Path, target: Path) -> tuple[int, int]:
    """Copy files into a new directory; return how many, and their bytes."""
    target.mkdir(mode=_MINE)
    # What appears meanwhile is not in the database that was copied before.
    files = sorted(path for path in source.rglob("*") if path.is_file())
    total = 0
    with Progress("Copying", len(files), "files") as bar:
        for file in files:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
            total += copy.stat().st_size
            bar.advance()
    return len(files), total


if __name__ == "__main__":
    run(app)
