"""Machine code on disk never outlives a source, and lies where this user can write."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bragg_data import files, kernels
from tests.users import NOBODY, let_all_read, needs_two_users, python_as_nobody

INNER = "from bragg_data.kernels import kernel\n@kernel()\ndef inner(x):\n    return {}\n"
OUTER = """
from bragg_data.kernels import kernel
from bragg_data.inner import inner
@kernel()
def outer(x):
    return inner(x)
"""
PROGRAM = (
    "from bragg_data.outer import outer\nprint(outer(2.0), sum(outer.stats.cache_hits.values()))"
)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with a package of two kernels, which other users can read."""
    let_all_read(tmp_path)
    package = tmp_path / "bragg_data"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in (kernels, files):
        shutil.copy(str(module.__file__), package)
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format("x + 1"))
    return tmp_path


def _printed(packages: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=packages, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_a_kernel_follows_the_sources_of_those_it_calls(packages: Path) -> None:
    assert _printed(packages) == "3.0 0\n"
    assert _printed(packages) == "3.0 1\n"
    (packages / "bragg_data" / "inner.py").write_text(INNER.format("x + 10"))
    assert _printed(packages) == "12.0 0\n"


@pytest.mark.slow
@needs_two_users
def test_a_read_only_installation_without_a_home_keeps_machine_code_for_the_user(
    packages: Path,
) -> None:
    temporary, cache = packages / "tmp", packages / "cache"
    for directory in (temporary, cache):
        directory.mkdir()
        directory.chmod(0o1777)

    def printed(**variables: str) -> tuple[str, int]:
        done = python_as_nobody("-c", PROGRAM, cwd=packages, PYTHONPATH="", **variables)
        return done.stdout, done.stderr.count("compiled loops cannot be kept")

    there = {"TMPDIR": str(temporary)}
    assert printed(**there) == ("3.0 0\n", 0)
    assert printed(**there) == ("3.0 1\n", 0)
    (folder,) = temporary.glob(f"bragg-{NOBODY}/kernels-*")
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    mine = {"XDG_CACHE_HOME": str(cache)}
    assert printed(**there, **mine) == ("3.0 0\n", 0)
    assert list(cache.glob("bragg/kernels-*"))
    # A folder that somebody else made there could hold their machine code.
    (temporary / f"bragg-{NOBODY}").rename(temporary / "before")
    (temporary / f"bragg-{NOBODY}").mkdir(mode=0o777)
    assert printed(**there) == ("3.0 0\n", 1)
    assert not list(temporary.glob(f"bragg-{NOBODY}/*"))
    assert not (packages / "bragg_data" / "__pycache__").exists()


def test_a_module_of_types_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    package = tmp_path / "bragg_data"
    package.mkdir()
    (package / "pair.py").write_text("from typing import NamedTuple\nclass Pair(NamedTuple): ...\n")
    before = kernels.cache_directory(tmp_path)
    (package / "pair.py").unlink()
    kernels.cache_directory.cache_clear()
    assert kernels.cache_directory(tmp_path) != before
