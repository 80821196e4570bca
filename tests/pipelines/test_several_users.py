"""A second user reads what a first one made, without writing there; a group may write."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bragg_data.files import lock_for
from catalog import registry
from tests.servers import ROOT
from tests.users import NOBODY, let_all_read, needs_two_users, python_as_nobody

if TYPE_CHECKING:
    from collections.abc import Callable

    from bragg_data.campaign import Campaign
    from catalog.tracking import Tracking


def files_below(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.rglob("*")}


@needs_two_users
@pytest.mark.training
def test_a_second_user_predicts_from_a_registry_that_he_cannot_write(
    trained: Tracking, small_campaign: Campaign, tmp_path: Path
) -> None:
    from tests.pipelines.prediction.samples import clean_pattern, write_noisy_file

    assert trained.database is not None
    file = write_noisy_file(tmp_path, small_campaign, clean_pattern(small_campaign))
    shared = trained.database.parent
    let_all_read(shared)
    let_all_read(tmp_path)
    before, temporary = files_below(shared), tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    there = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    arguments = ("predict", str(file), "--tracking", trained.uri, "--json")
    done = python_as_nobody("-m", "pipelines", *arguments, cwd=temporary, **there)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(done.stdout)
    assert result["phase"] in {phase.name for phase in small_campaign.phases}
    assert files_below(shared) == before
    left = {path.name for path in temporary.iterdir()}
    assert not {name for name in left if "promotion" in name or name.endswith(".lock")}


def test_promotions_are_locked_next_to_the_database(
    tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    tracking = tracking_in(tmp_path)
    with registry._lock(tracking, "cells"):
        (lock,) = tmp_path.glob(".promotion-*.lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o664  # also under another umask, for the group
    other = registry._lock(tracking, "others")
    with other:
        assert len(list(tmp_path.glob(".promotion-*.lock"))) == 2


@needs_two_users
def test_a_group_shares_a_lock_and_readers_take_none(tmp_path: Path) -> None:
    let_all_read(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    os.chown(shared, 0, NOBODY)
    with lock_for(shared / "file"):
        pass
    (shared / "file.lock").chmod(0o664)
    os.chown(shared / "file.lock", 0, NOBODY)  # as the bit setgid of a group's folder does
    program = (
        "import sys, pathlib; from bragg_data.files import lock_for\n"
        "with lock_for(pathlib.Path(sys.argv[1])) as lock: print(type(lock).__name__)"
    )
    done = python_as_nobody("-c", program, str(shared / "file"), PYTHONPATH=str(ROOT))
    assert "FileLock" in done.stdout, done.stderr
    shared.chmod(0o755)
    done = python_as_nobody("-c", program, str(shared / "file"), PYTHONPATH=str(ROOT))
    assert done.stdout == "NoneType\n", done.stderr
