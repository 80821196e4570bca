"""The commit of the code that runs."""

import hashlib
import json
import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_FILE = "bragg_data/provenance.py"


def code_commit() -> str:
    """Return the commit of this project's code, with ``-dirty`` if it was changed since.

    The commit of a git repository counts only if this file is at its place in it and tracked: a
    package that is installed somewhere inside another project's repository is none of that
    project's commits. An installation by ``pip install git+https://…`` records its commit itself.
    The commit has 40 hexadecimal digits; it is ``unknown`` where nothing records one.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() == _ROOT:
            _git("ls-files", "--error-unmatch", "--", _FILE)
            return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, no repository, or a file that is not tracked
    return _installed_commit()


@cache
def source_digest() -> str:
    """Return the SHA-256 of what computes here, as it is, committed or not."""
    digest = hashlib.sha256()
    for folder in ("bragg_data", "pipelines"):
        for file in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(_ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    # A git hook sets these, for the repository in which it runs.
    foreign = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    return subprocess.run(
        ["git", *arguments], cwd=_ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def _installed_commit() -> str:
    """Return the commit that pip recorded (direct_url.json of PEP 610), or ``unknown``."""
    try:
        installed = distribution("bragg")
    except PackageNotFoundError:
        return "unknown"
    if Path(str(installed.locate_file(_FILE))).resolve() != _ROOT / _FILE:
        return "unknown"
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return str(origin.get("vcs_info", {}).get("commit_id", "unknown"))
