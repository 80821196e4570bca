"""The documentation builds without warnings, and keeps its promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", directory],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "JUPYTER_PLATFORM_DIRS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_every_command_is_in_the_reference(site):
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for path in (ROOT / "pipelines").glob("[a-z]*.py"):
        assert f"bragg {path.stem.replace('_', '-')}</code>" in page, path.name


@pytest.mark.slow
def test_every_module_is_in_the_architecture(site):
    page = (site / "explanation" / "architecture.html").read_text(encoding="utf-8")
    for package in ("bragg_data", "bragg_models", "catalog", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert f"<code>{path.relative_to(ROOT)}</code>" in page, path


@pytest.mark.slow
def test_pages_load_nothing_from_other_machines(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        sources = r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]*)"
        elsewhere = re.findall(sources, text)
        assert not elsewhere, page


@pytest.mark.slow
def test_formulas_and_references_are_rendered(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<p>.. math::" not in text, page
        assert not re.search(r":(?:class|func|mod|meth|data|attr|math):<code>", text), page


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    assert not re.findall(r"@[A-Z0-9]+@", text)
