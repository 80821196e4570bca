"""Machine code on disk never outlives a source that it was compiled from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bragg_data import kernels

INNER = "from bragg_data.kernels import kernel\n@kernel()\ndef inner(x):\n    return {}\n"
OUTER = """
from bragg_data.kernels import kernel
from bragg_data.inner import inner
@kernel()
def outer(x):
    return inner(x)
"""


def _printed(packages: Path) -> str:
    program = (
        "from bragg_data.outer import outer\n"
        "print(outer(2.0), sum(outer.stats.cache_hits.values()))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=packages, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_a_kernel_follows_the_sources_of_those_it_calls(tmp_path: Path) -> None:
    package = tmp_path / "bragg_data"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(kernels.__file__, package)
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format("x + 1"))
    assert _printed(tmp_path) == "3.0 0\n"
    assert _printed(tmp_path) == "3.0 1\n"
    (package / "inner.py").write_text(INNER.format("x + 10"))
    assert _printed(tmp_path) == "12.0 0\n"


def test_a_module_of_types_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    package = tmp_path / "bragg_data"
    package.mkdir()
    (package / "pair.py").write_text("from typing import NamedTuple\nclass Pair(NamedTuple): ...\n")
    before = kernels.cache_directory(tmp_path)
    (package / "pair.py").unlink()
    kernels.cache_directory.cache_clear()
    assert kernels.cache_directory(tmp_path) != before
