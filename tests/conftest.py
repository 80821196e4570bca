"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TEST_CLUSTER = Path(__file__).parents[1] / "deploy" / "slurm" / "test_cluster"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """A running SLURM with two nodes, to which SLURM_CONF points; yields its directory.

    Without SLURM's programs the tests are skipped, unless BRAGG_REQUIRE_SLURM=1 demands them.
    """
    # Not pytest's own directories, whose paths are too long for sockets.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        started = subprocess.run(
            [TEST_CLUSTER, "start", directory], capture_output=True, text=True, check=False
        )
        if started.returncode == os.EX_UNAVAILABLE and os.environ.get("BRAGG_REQUIRE_SLURM") != "1":
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        patch.setenv(*started.stdout.removeprefix("export ").strip().split("="))
        yield Path(directory)
        subprocess.run([TEST_CLUSTER, "stop", directory], check=True)
