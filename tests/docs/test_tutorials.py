"""Every code block of the tutorials is executed, in the order of the page.

Commands run in this process, which has imported what takes seconds in each; the first of all,
servers and programs are processes of their own.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines import __main__ as bragg
from pipelines.end_to_end import material
from pipelines.training import presets
from tests.conftest import FIRST_COMMAND, link_indices
from tests.small_bench import short_presets

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BACKGROUND = "in a second terminal"


class Block(NamedTuple):
    """A fenced block: its language, the title that names a file, and its text."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(*match) for match in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture
def environment(tmp_path, indices) -> dict[str, str]:
    """A working directory with the bundled examples, and the installed ``bragg`` on the path."""
    link_indices(tmp_path, indices)
    shutil.copytree(ROOT / "pipelines" / "examples", tmp_path / "pipelines" / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def execute(block: str, first_run: Callable[[], Path]) -> None:
    """Execute a block's lines as a shell does: ``bragg COMMAND … [> FILE]``."""
    for line in block.replace("\\\n", " ").splitlines():
        if line == FIRST_COMMAND:
            # Executed as a process in an empty directory, once for all tests: here are its results.
            ignore = shutil.ignore_patterns("index", "training")
            shutil.copytree(first_run() / "data", "data", ignore=ignore, dirs_exist_ok=True)
            continue
        command, _, file = line.partition(" > ")
        name, *arguments = shlex.split(command)
        assert name == "bragg", line
        with (
            Path(file or os.devnull).open("w", encoding="utf-8") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(io.StringIO()) as errors,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", [name, *arguments])
            with pytest.raises(SystemExit) as exit_:
                bragg.main()
        assert exit_.value.code == 0, f"{line}\n{errors.getvalue()}"


def answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until a server answers; False if it ends before."""
    deadline = time.monotonic() + 150
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.2)
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, environment, tracking_in, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking_in(tmp_path / "data")
    # Models are trained, calibrated and tested on fewer profiles than a user's.
    monkeypatch.setattr(presets, "DEFAULT_PRESETS", short_presets())
    monkeypatch.setattr(material, "_DRAWS", (60, 60))
    monkeypatch.setattr(material, "_FEWEST_DRAWS", 60)
    monkeypatch.setattr(material, "_FOREIGN_DRAWS", 10)
    for block in blocks_of(page):
        if block.language in ("text", "toml"):
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.title == BACKGROUND:
            (port,) = re.findall(r"--port (\d+)", block.text)
            printed = Path("printed.txt")
            with printed.open("w", encoding="utf-8") as log:
                server = subprocess.Popen(
                    ["bash", "-euc", block.text],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                assert answers(f"http://127.0.0.1:{port}/health", server), printed.read_text()
            finally:
                os.killpg(server.pid, signal.SIGINT)
                server.wait(60)
            # of a page on this machine that shows the runs
            address = rf"http://127\.0\.0\.1:{port}/#/experiments/\d+/runs"
            assert re.search(address, printed.read_text()), printed.read_text()
        elif block.language == "bash":
            execute(block.text, lambda: request.getfixturevalue("first_run"))
        else:
            command = [sys.executable, "-c", block.text]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path, environment, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    notebook = nbformat.read(TUTORIALS / "query-the-store.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert outputs[-1][0]["data"]["text/plain"].startswith("{'tag': 'batio3-nomad-v1'")
