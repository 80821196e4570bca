"""The record of answers: what was asked, what was answered, and by what, in a bounded database.

It is a SQLite database in a folder of this machine. What is committed survives the death of the
process; beyond the limit the oldest requests are dropped, with their answers.
"""

import hashlib
import json
import platform
import secrets
import sqlite3
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic_core import PydanticSerializationError, to_json

from bragg_data.errors import first_line
from bragg_data.files import is_private
from bragg_data.provenance import code_commit
from bragg_models.predictors import Predictor
from catalog.model_files import recorded_hashes
from catalog.registry import ModelVersion
from pipelines.cli.options import RECORD_MEGABYTES
from pipelines.recording.input_statistics import Statistics

FILE = "record.sqlite"
# Packages whose versions a result may depend on.
_LIBRARIES = ("numpy", "scipy", "numba", "torch", "scikit-learn", "gemmi", "icechunk", "zarr")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS origins (origin TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT UNIQUE NOT NULL, at REAL NOT NULL,
    origin TEXT NOT NULL, route TEXT NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY, size INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (1, 0);
CREATE TABLE IF NOT EXISTS bound (id INTEGER PRIMARY KEY, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    request TEXT NOT NULL, row INTEGER NOT NULL, batch TEXT NOT NULL, answer TEXT NOT NULL,
    statistics TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (request, row)
) WITHOUT ROWID;
"""
_ANSWERS = """
SELECT r.request, a.row, r.at, r.origin, r.route, a.batch, a.answer, a.statistics, a.seconds
FROM answers a JOIN requests r USING (request)
"""

Origin = Mapping[str, Any]
"""What an answer is computed by, as JSON values: see :func:`origin_of`."""


class RecordError(RuntimeError):
    """A record that cannot be read or written, or that does not hold an answer."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """A request and its answers; without answers it is an input that was computed with others."""

    request: str  # id, of :func:`new_id`
    route: str  # of the service, or FILES
    body: bytes  # as received
    origin: Origin = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    statistics: Sequence[Statistics] = ()  # of each answer, next to acceptance and misfit
    batches: Sequence[str] = ()  # of each answer, what was computed together with it
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class RecordedAnswer:
    """An answer of the record."""

    request: str
    row: int  # of the request's profiles
    at: float  # Unix time
    origin: str  # key of what it is computed by
    route: str
    batch: str
    answer: str  # JSON
    statistics_json: str
    seconds: float

    @property
    def statistics(self) -> Statistics:
        """The statistics of the profile, with acceptance (0 or 1) and misfit."""
        return dict(json.loads(self.statistics_json))

    @property
    def id(self) -> str:
        """The id that was returned with the answer."""
        return answer_id(self.request, self.row)


def new_id() -> str:
    """Return a new id of a request: the time in about milliseconds, then 32 random bits.

    In the order of time the database appends, which takes half as long as inserting anywhere.
    """
    return f"{time.time_ns() >> 20:011x}{secrets.token_hex(4)}"


def answer_id(request: str, row: int) -> str:
    """Return the id of the answer to one of a request's profiles."""
    return f"{request}-{row}"


@cache
def _environment() -> Mapping[str, Any]:
    return {
        "code": code_commit(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def origin_of(models: Sequence[tuple[Predictor, ModelVersion]]) -> Origin:
    """Return what answers of a model, or of those of several banks, are computed by, as JSON.

    The version with the SHA-256 of its files, its snapshot, the SHA-256 of campaign, CIFs and
    instrument, the code's commit, the versions of libraries, processor and threads. Of several
    those of the first, and of all as ``banks``.
    """
    origins = [_origin_of(predictor, version) for predictor, version in models]
    return {**origins[0], "banks": origins} if len(origins) > 1 else origins[0]


def _origin_of(predictor: Predictor, version: ModelVersion) -> Origin:
    provenance, data = predictor.provenance, predictor.provenance.data
    return {
        "model": version.uri,
        "kind": provenance.model,
        "files": dict(recorded_hashes(version)),
        "snapshot": {
            "tag": data.tag,
            "id": data.snapshot_id,
            "content": data.content_hash,
            "uri": data.uri,
        },
        "texts": text_hashes(
            provenance.campaign_toml, provenance.cifs, provenance.instrument_instprm
        ),
        "threads": torch.get_num_threads(),
        **_environment(),
    }


def text_hashes(toml: str, cifs: Mapping[str, str], instprm: str) -> dict[str, str]:
    """Return the SHA-256 of a campaign's texts, by what they are."""
    texts = {"campaign": toml, **{f"CIF of {n}": t for n, t in cifs.items()}, "instrument": instprm}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


class Record:
    """The record in a folder; several processes may write to it and read it.

    Its limit stays as it is unless ``megabytes`` are given. Raises `RecordError` if it cannot be
    opened; without ``create`` also if there is none.
    """

    def __init__(
        self, folder: Path, megabytes: float | None = None, *, create: bool = False
    ) -> None:
        path = folder / FILE
        if not create and not path.is_file():
            raise RecordError(
                f"{folder} holds no record of answers. Begin one with bragg serve --record {folder}"
            )
        self.folder = folder
        self._keys: dict[int, tuple[str, Origin]] = {}  # by the identity of an origin
        if create and not is_private(folder) and folder.is_dir():
            warnings.warn(
                f"Others can write to the folder {folder}: they could replace the record. Let no "
                f"one else write there: chmod go-w {folder}",
                stacklevel=2,
            )
        with _problems(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if create:
                path.touch(0o600)  # SQLite would let others read it
            # Calls are one at a time: of the thread of the service's recorder, or of a command.
            self._database = sqlite3.connect(path, timeout=30, check_same_thread=False)
            weakref.finalize(self, self._database.close)
            # Commits survive a killed process; a power cut may cost the last ones, no more.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA journal_size_limit = 4000000")
            self._database.executescript(_SCHEMA)
            with self._database as database:
                default = "INSERT OR IGNORE INTO bound VALUES (1, ?)"
                database.execute(default, (int(1e6 * RECORD_MEGABYTES),))
                if megabytes is not None:
                    database.execute("UPDATE bound SET size = ?", (int(1e6 * megabytes),))

    def write(self, exchanges: Sequence[Exchange]) -> list[bool]:
        """Write requests and their answers in one transaction; drop the oldest beyond the limit.

        A request that is there already gets its answers. Returns for each whether it was written:
        what is larger than the limit is not.
        """
        now = time.time()
        with _problems(self.folder), self._keys_as_before(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            limit = self.limit
            origins = {id(exchange.origin): exchange.origin for exchange in exchanges}  # few
            keys = {of: self._key(of, origin) for of, origin in origins.items()}
            sizes = [self._write(e, keys[id(e.origin)], now, limit) for e in exchanges]
            database.execute("UPDATE total SET size = size + ?", (sum(filter(None, sizes)),))
            self._drop_oldest(limit)
        return [size is not None for size in sizes]

    @contextmanager
    def _keys_as_before(self) -> Iterator[None]:
        """Forget the keys of a transaction that fails."""
        before = dict(self._keys)
        try:
            yield
        except BaseException:
            self._keys = before
            raise

    def _key(self, of: int, origin: Origin) -> str:
        """Return the key of what answers are computed by, which is in the database now."""
        if of not in self._keys:
            text = json.dumps(origin, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._database.execute("INSERT OR IGNORE INTO origins VALUES (?, ?)", (key, text))
            self._keys[of] = key, origin  # which is kept, so that no other one gets its identity
        return self._keys[of][0]

    def _write(self, e: Exchange, origin: str, now: float, limit: int) -> int | None:
        """Return by how many bytes the record grows; None if that is more than the limit."""
        database = self._database
        rows = [
            (e.request, row, batch, _json(answer), _json(statistics), e.seconds)
            for row, (batch, answer, statistics) in enumerate(
                zip(e.batches, e.answers, e.statistics, strict=True)
            )
        ]
        size = sum(len(row[2]) + len(row[3]) + len(row[4]) for row in rows)
        if len(e.body) + size > limit:
            return None
        new = database.execute(
            "INSERT INTO requests (request, at, origin, route, size, body) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (request) DO NOTHING",
            (e.request, now, origin, e.route, len(e.body) + size, e.body),
        ).rowcount
        if not new:
            of_answers = "UPDATE requests SET size = size + ? WHERE request = ?"
            database.execute(of_answers, (size, e.request))
        database.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)
        return new * len(e.body) + size

    @property
    def size(self) -> int:
        """Bytes that requests and answers take."""
        return int(self._database.execute("SELECT size FROM total").fetchone()[0])

    @property
    def limit(self) -> int:
        """Bytes beyond which the oldest requests are dropped."""
        return int(self._database.execute("SELECT size FROM bound").fetchone()[0])

    def _drop_oldest(self, limit: int) -> None:
        surplus = self.size - limit
        if surplus <= 0:
            return
        query = "SELECT number, size FROM requests ORDER BY number"
        last, dropped = 0, 0
        for number, size in self._database.execute(query):
            last, dropped = number, dropped + size
            if dropped >= surplus:
                break
        of_dropped = "(SELECT request FROM requests WHERE number <= ?)"
        self._database.execute(f"DELETE FROM answers WHERE request IN {of_dropped}", (last,))
        self._database.execute("DELETE FROM requests WHERE number <= ?", (last,))
        self._database.execute("UPDATE total SET size = size - ?", (dropped,))

    def answers(self, last: int | None = None) -> list[RecordedAnswer]:
        """Return the last answers, or all, the oldest first."""
        limit = "" if last is None else f"LIMIT {int(last)}"
        query = f"{_ANSWERS} ORDER BY r.number DESC, a.row DESC {limit}"
        return self._answers(query, ())[::-1]

    def find(self, name: str) -> list[RecordedAnswer]:
        """Return the answer of an id, or all of a request's; raises `RecordError` without any."""
        request, _, row = name.partition("-")
        query = f"{_ANSWERS} WHERE r.request = ?" + (" AND a.row = ?" if row else "")
        answers = self._answers(f"{query} ORDER BY a.row", (request, row) if row else (request,))
        if not answers:
            raise RecordError(
                f"The record {self.folder} holds no answer {name}: it is another record's, or it "
                f"was dropped as the oldest beyond the limit."
            )
        return answers

    def _answers(self, query: str, values: Sequence[str]) -> list[RecordedAnswer]:
        with _problems(self.folder):
            rows = self._database.execute(query, values).fetchall()
        return [RecordedAnswer(*row) for row in rows]

    def origin(self, key: str) -> Origin:
        """Return what an answer is computed by."""
        return dict(json.loads(self._row("SELECT document FROM origins WHERE origin = ?", key)[0]))

    def input(self, request: str) -> tuple[str, bytes] | None:
        """Return route and body of a request; None if it was dropped."""
        query = "SELECT route, body FROM requests WHERE request = ?"
        row = self._row(query, request)
        return None if row is None else (str(row[0]), bytes(row[1]))

    def _row(self, query: str, value: str) -> Any:
        with _problems(self.folder):
            return self._database.execute(query, (value,)).fetchone()

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def _json(value: object) -> str:
    try:
        return to_json(value).decode()  # a fifth of the time
    except PydanticSerializationError:  # a name of a file that is not UTF-8, which ASCII holds
        return json.dumps(value, separators=(",", ":"))


@contextmanager
def _problems(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RecordError(
            f"The record {folder} cannot be used: {first_line(error)}. Name a folder on a disk of "
            f"this machine that has room, or another one if {FILE} is damaged."
        ) from error
