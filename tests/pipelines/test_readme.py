"""The README keeps its promises about the house."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("bragg_data", "bragg_models", "catalog", "pipelines", "benchmarks")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_has_its_line(package):
    for path in (ROOT / package).rglob("*.py"):
        if path.name != "__init__.py":
            assert f"| `{path.relative_to(ROOT)}` |" in README, path


def test_no_line_is_about_a_file_that_is_gone():
    for name in re.findall(r"^\| `((?:[a-z_]+/)+[\w.]*)` \|", README, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z0-9]+@", README)
