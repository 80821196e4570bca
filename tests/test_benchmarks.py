"""The benchmarks start, with the names that the packages have now."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((PROJECT / "benchmarks").glob("*.py")), ids=lambda p: p.stem
)
def test_benchmark_explains_its_options(path: Path) -> None:
    command = [sys.executable, str(path), "--help"]
    shown = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--help" in shown.stdout
