"""Which code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_commit() -> str:
    """Return the commit of this project's code, with -dirty if it was changed since."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
