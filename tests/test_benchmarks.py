"""The benchmarks start, with the names that the packages have now."""

import runpy
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((PROJECT / "benchmarks").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_benchmark_explains_its_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr()
    assert exit_.value.code == 0, shown.err
    assert "--help" in shown.out
