"""The file of an sqlite tracking database: whether it can be used, and where its files are.

MLflow writes absolute addresses of artifacts into the database. They end in ``mlartifacts/…``, the
folder next to the database: where a folder was moved, these parts are found again.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"  # folder of the artifacts, next to the database

_SECONDS = 5.0  # to wait for who writes; writing takes milliseconds
_PROBLEMS = ("locked", "not a database", "malformed")  # others may be a reader's who cannot write
_RESTORE = "Restore a backup with python -m pipelines.tracking_server restore"
# Columns that hold addresses of artifacts.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class DatabaseError(RuntimeError):
    """A file that is no usable tracking database."""


def path_of(uri: str) -> Path | None:
    """Return the file of an sqlite database by its URI; None for a server or another database."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def check_database(path: Path) -> None:
    """Raise a `DatabaseError` if a file exists and is empty, locked, or no database."""
    if not path.exists():
        return
    if not path.stat().st_size:
        raise DatabaseError(
            f"{path} is empty: the runs and models that it had are lost. {_RESTORE}, or delete the "
            f"file to begin with an empty registry."
        )
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_SECONDS)) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        if any(sign in str(error) for sign in _PROBLEMS):
            raise DatabaseError(problem_of(str(error), str(path))) from error


def problem_of(reason: str, place: str) -> str:
    """Return cause and remedy, in full sentences, of what a database or server reports."""
    if "locked" in reason:
        return (
            f"The database {place} is locked: another program has been writing to it for seconds. "
            f"End it or wait; a server takes many users at a time (python -m "
            f"pipelines.tracking_server serve)."
        )
    if "not a database" in reason or "malformed" in reason:
        return f"{place} is damaged ({reason}). {_RESTORE}."
    if any(sign in reason for sign in ("Connection", "Max retries", "refused", "timed out")):
        return f"The tracking server {place} does not answer. Start it again, then run this again."
    return f"MLflow at {place} cannot be used: {reason.rstrip('.')}."


def moved(address: str, path: Path) -> str | None:
    """Return the address of an artifact next to the database that it was moved with.

    None if it is where the address names it, or not next to the database at ``path`` either.
    """
    before, separator, tail = address.rpartition(f"/{ARTIFACTS}/")
    if not separator or not before.startswith(("file:", "/")):
        return None
    file = path.parent / ARTIFACTS / unquote(tail)
    present = Path(unquote(urlsplit(address).path))
    return file.as_uri() if file.exists() and file != present else None


def relocate(path: Path) -> int:
    """Correct the addresses of a database whose folder was moved; return how many.

    All are changed together, or none. Raises `DatabaseError` if the file is no usable database.
    """
    if not path.exists():
        raise DatabaseError(f"There is no database {path}. Name one with --tracking.")
    check_database(path)
    root = (path.parent / ARTIFACTS).as_uri()
    count = 0
    with closing(sqlite3.connect(path, timeout=_SECONDS)) as db, db:
        for table, column in _ADDRESSES:
            pattern = f"%/{ARTIFACTS}/%"
            select = f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE ?"
            for (address,) in db.execute(select, (pattern,)).fetchall():
                before, _, tail = address.rpartition(f"/{ARTIFACTS}/")
                new = f"{root}/{quote(unquote(tail))}"
                if before + f"/{ARTIFACTS}" == root or not before.startswith(("file:", "/")):
                    continue
                update = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"
                count += db.execute(update, (new, address)).rowcount
    return count
