"""Programs as a second user, for the tests of shared and read-only folders."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers import ROOT

NOBODY = 65534
_READS_ALL = "dac_read_search"  # root's Python may lie where others cannot look, but not write

needs_two_users = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="takes root, and setpriv"
)


def python_as_nobody(
    *arguments: str, cwd: Path = ROOT, home: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python as a user without rights to write; HOME is unset unless a folder is named."""
    sets = ("inh-caps", "ambient-caps", "bounding-set")
    rights = (f"--{name}=-all,+{_READS_ALL}" for name in sets)
    user = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    environment: Mapping[str, str] = {
        **{k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TMPDIR")},
        **({} if home is None else {"HOME": str(home)}),
        "PYTHONDONTWRITEBYTECODE": "1",
        **variables,
    }
    return subprocess.run(
        ["setpriv", *user, *rights, sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        umask=0o022,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def let_all_read(directory: Path) -> None:
    """Let other users into a directory, and into those above it that are this user's."""
    for folder in (directory, *directory.parents):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o755)
