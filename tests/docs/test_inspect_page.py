"""The guide to ``bragg inspect``: its commands run, and print what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines import inspect
from pipelines.cli.console import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "inspect.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```bash\nbragg inspect (.*?)^```\n\n```text\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize(("arguments", "output"), SHOWN, ids=range(len(SHOWN)))
def test_a_command_prints_what_the_page_shows(
    arguments: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        run(inspect.app, shlex.split(arguments.replace("\\\n", " ")))
    assert exit_.value.code == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line] == [line for line in output.splitlines() if line]


def test_the_page_shows_three_commands() -> None:
    assert len(SHOWN) == 3
