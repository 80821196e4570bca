"""The database and the files of an MLflow server: its backend, backups, and restoring one."""

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from filelock import FileLock
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from bragg_data.errors import first_line
from catalog.tracking import Tracking

ARTIFACTS = "artifacts"  # directory of files of runs and models, in home and in a backup
_SQLITE = "sqlite:///"
_MANIFEST = "backup.json"
_MODE = 0o700  # runs and models are read through the server, not from its directory

OnFile = Callable[[], object]  # called after each copied file


class TrackingServerError(RuntimeError):
    """A server that cannot be started, or a backup that cannot be made or restored."""


@dataclass(frozen=True)
class Backup:
    """Contents of a backup; its ``backup.json``."""

    created_at: str  # ISO 8601, UTC
    database: str  # name of the file: database.sqlite or database.dump
    artifacts: int  # number of files of runs and models
    bytes: int  # their size

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the contents of a backup; raises `TrackingServerError` if it is not complete."""
        try:
            values = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
            if "created_at" not in values:
                values["created_at"] = values.pop("made_at")  # deprecated key
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TrackingServerError(
                f"{directory} is no complete backup ({error}). Name one that backup printed."
            ) from error


def backend_uri(home: Path, backend: str | None) -> str:
    """Return the URI of a server's database, by default sqlite in its home directory.

    Raises `TrackingServerError` if it is neither sqlite nor PostgreSQL.
    """
    uri = backend or f"{_SQLITE}{home.absolute() / 'mlflow.db'}"
    if not uri.startswith((_SQLITE, "postgresql://")):
        raise TrackingServerError(
            f"'{uri.partition(':')[0]}:' is no database that the server is run with. Give "
            f"postgresql://USER@HOST/DATABASE, or nothing for sqlite."
        )
    return uri


def prepare_home(home: Path, uri: str) -> None:
    """Create a server's home directory, and its database if it is sqlite."""
    home.mkdir(mode=_MODE, parents=True, exist_ok=True)
    if uri.startswith(_SQLITE):
        Tracking(uri)  # creates the tables, one process at a time
        with closing(sqlite3.connect(uri.removeprefix(_SQLITE))) as database:
            # Readers and a writer at the same time; the setting stays with the file.
            database.execute("PRAGMA journal_mode=WAL")


def create_backup(into: Path, home: Path, uri: str, on_file: OnFile) -> tuple[Path, Backup]:
    """Copy database and files into a new directory, while the server runs.

    The database is copied first: the files that it names are among those copied after it. The
    directory appears when it is complete.

    Returns the new directory in `into`, and its contents; raises `TrackingServerError` if there is
    no database, or its own programs fail.
    """
    now = datetime.now(UTC)
    directory = into / f"mlflow-{now:%Y%m%dT%H%M%S%fZ}"
    into.mkdir(mode=_MODE, parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=into))
    try:
        database = _dump(uri, partial)
        files, size = _copy_files(home / ARTIFACTS, partial / ARTIFACTS, on_file)
        backup = Backup(now.isoformat(timespec="seconds"), database, files, size)
        (partial / _MANIFEST).write_text(json.dumps(asdict(backup), indent=1), encoding="utf-8")
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory, backup


def restore_backup(directory: Path, home: Path, uri: str, on_file: OnFile) -> Backup:
    """Fill an empty home directory, and an empty database, from a backup.

    Raises `TrackingServerError` if the backup is not complete or of another kind of database, or
    something is there already: nothing is overwritten.
    """
    backup = Backup.read(directory)
    if uri.startswith(_SQLITE) != backup.database.endswith("sqlite"):
        raise TrackingServerError(
            f"{directory} holds {backup.database}, which cannot become a database at "
            f"{uri.partition(':')[0]}: restore it with the kind of backend that it was made from."
        )
    if home.exists() and any(home.iterdir()):
        raise TrackingServerError(f"{home} is not empty. Name a new directory with --home.")
    home.mkdir(mode=_MODE, parents=True, exist_ok=True)
    with FileLock(home / ".restore.lock", fallback_to_soft=False):
        _load(directory / backup.database, uri)
        files, size = _copy_files(directory / ARTIFACTS, home / ARTIFACTS, on_file)
    (home / ".restore.lock").unlink(missing_ok=True)
    if (files, size) != (backup.artifacts, backup.bytes):
        raise TrackingServerError(
            f"{directory} held {backup.artifacts} files of {backup.bytes} bytes at first, "
            f"and holds {files} of {size} now. Take another backup."
        )
    return backup


def _dump(uri: str, into: Path) -> str:
    """Copy a database as it is at one moment; return the file's name."""
    if not uri.startswith(_SQLITE):
        _run_postgresql("pg_dump", "--format=custom", f"--file={into / 'database.dump'}", uri=uri)
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
            f"{make_url(uri)!r} is not empty: it has {len(tables)} tables. Create a new database."
        )
    _run_postgresql("pg_restore", "--no-owner", "--exit-on-error", str(file), uri=uri)


def _run_postgresql(program: str, *arguments: str, uri: str) -> None:
    """Run a program of PostgreSQL; the URI is in its environment, where ps does not show it."""
    url = make_url(uri)
    settings = {
        "PGHOST": url.host,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGDATABASE": url.database,
        "PGPORT": url.port and str(url.port),
        **{f"PG{key.upper()}": str(value) for key, value in url.query.items()},
    }
    environment = os.environ | {name: value for name, value in settings.items() if value}
    database = [f"--dbname={url.database}"] if program == "pg_restore" else []
    if shutil.which(program) is None:
        raise TrackingServerError(f"{program} is not installed: it is one of PostgreSQL's clients.")
    command = [program, *database, *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TrackingServerError(f"{program} failed on {url!r}: {reason}") from error


def files_of(directory: Path) -> list[Path]:
    """Return the files in a directory and below; none if it does not exist."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _copy_files(source: Path, target: Path, on_file: OnFile) -> tuple[int, int]:
    target.mkdir(mode=_MODE)
    # Files that appear meanwhile are not in the database that was copied before.
    files = files_of(source)
    total = 0
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
        total += copy.stat().st_size
        on_file()
    return len(files), total
