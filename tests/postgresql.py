"""A PostgreSQL server of its own, for the tests that use or kill one."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.servers import free_port

_MISSING = "needs PostgreSQL's own programs (initdb, pg_ctl, pg_dump)"


class PostgreSql:
    """A server in a directory of its own, a context manager; the test is skipped without one."""

    def __init__(self, port: int | None = None) -> None:
        pg_ctl = shutil.which("pg_ctl") or max(
            map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")), default=None
        )
        if pg_ctl is None:
            if os.environ.get("BRAGG_REQUIRE_POSTGRESQL") == "1":
                pytest.fail(_MISSING)
            pytest.skip(_MISSING)
        self._programs = Path(pg_ctl).resolve().parent
        # It refuses to run as root; and it cannot enter pytest's own directories as somebody else.
        self._user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self._port = port or free_port()
        self._directory = ""

    def __enter__(self) -> Self:
        self._directory = tempfile.mkdtemp(prefix="postgresql-")
        shutil.chown(self._directory, self._user)
        self._call("initdb", "--auth=trust", "--username=team", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._postmaster() is not None:
            self._call("pg_ctl", "stop", "-w", "-m", "fast")
        shutil.rmtree(self._directory)

    def start(self) -> None:
        """Start it; after a kill it recovers first."""
        options = f"-p {self._port} -k {self._directory} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._call("pg_ctl", "start", "-w", "-l", f"{self._directory}/log", "-o", options)

    def kill(self) -> None:
        """End all its processes by SIGKILL."""
        postmaster = self._postmaster()
        assert postmaster is not None
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 30)

    def database(self, name: str, user: str = "team") -> str:
        """Make a database; return its URI."""
        psycopg = pytest.importorskip("psycopg")
        server = f"127.0.0.1:{self._port}"
        with psycopg.connect(f"postgresql://team@{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://{user}@{server}/{name}"

    def _postmaster(self) -> psutil.Process | None:
        file = Path(self._directory, "data", "postmaster.pid")
        try:
            return psutil.Process(int(file.read_text().split()[0]))
        except (OSError, psutil.NoSuchProcess):
            return None

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, "-D", f"{self._directory}/data", *arguments],
            check=True,
            user=self._user if os.getuid() == 0 else None,
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
        )
