"""The commit of the code: of this project's repository alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bragg_data import provenance

SOURCE = Path(provenance.__file__).parent


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of another project, with one commit."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "README").write_text("another project\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    return root


def install(place: Path) -> Path:
    (place / "bragg_data").mkdir(parents=True)
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(SOURCE / name, place / "bragg_data")
    return place


def commit_from(place: Path, **environment: str) -> str:
    """Return what the package says that is installed in a directory."""
    program = "from bragg_data.provenance import code_commit; print(code_commit())"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(place), **environment},
    ).stdout.strip()


@pytest.mark.parametrize(
    ("place", "tracked"),
    [(".venv/lib/site-packages", False), ("vendored", False), ("vendored", True), (".", False)],
)
def test_another_projects_commit_is_not_recorded(
    repository: Path, place: str, tracked: bool
) -> None:
    installed = install(repository / place)
    if tracked:
        git(repository, "add", "-f", ".")
        git(repository, "commit", "-qm", "two")
    assert commit_from(installed) == "unknown"


def test_commit_of_the_project_s_repository(repository: Path) -> None:
    install(repository)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "two")
    head = git(repository, "rev-parse", "HEAD")
    assert commit_from(repository) == head
    (repository / "README").write_text("changed\n")
    assert commit_from(repository) == f"{head}-dirty"


def test_a_git_hook_of_another_repository_changes_nothing(repository: Path, tmp_path: Path) -> None:
    installed = install(tmp_path / "installed")
    assert commit_from(installed, GIT_DIR=str(repository / ".git")) == "unknown"


def test_commit_that_pip_recorded(repository: Path) -> None:
    installed = install(repository / "site-packages")
    metadata = installed / "bragg-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bragg\nVersion: 0.1.0\n")
    commit = "0123456789abcdef0123456789abcdef01234567"
    origin = {"url": "https://host/bragg.git", "vcs_info": {"vcs": "git", "commit_id": commit}}
    (metadata / "direct_url.json").write_text(json.dumps(origin))
    assert commit_from(installed) == commit
