"""Run a command of this project by its name, or list the commands: ``bragg [COMMAND …]``."""

import difflib
import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from pipelines.cli.console import console, fail, run, say


def commands() -> dict[str, str]:
    """Return the first line of each command's docstring, by its name."""
    lines = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        # Reading is enough: importing all of them would take seconds.
        if '__name__ == "__main__"' in source:
            lines[path.stem] = source.partition('"""')[2].partition("\n")[0].removesuffix('"""')
    return lines


def main() -> NoReturn:
    """Run the command that the first argument names; without one, list them."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        _list_commands()
        sys.exit(0)
    if name == "--version":
        say(f"bragg {metadata.version('bragg')}")
        sys.exit(0)
    known, module = commands(), name.replace("-", "_")
    if module not in known:
        near = difflib.get_close_matches(module, known, n=3)
        remedy = f"Did you mean {' or '.join(near)}?" if near else "bragg --help lists them."
        fail(f"There is no command '{name}'. {remedy}")
        sys.exit(2)
    run(importlib.import_module(f"pipelines.{module}").app, arguments, f"bragg {name}")


def _list_commands() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, line in commands().items():
        table.add_row(f"[cyan]{name.replace('_', '-')}[/]", line)
    say("Usage: bragg COMMAND [OPTIONS], or python -m pipelines.COMMAND [OPTIONS]\n")
    console.print(table)
    say("\nbragg COMMAND --help explains the options of a command.")


if __name__ == "__main__":
    main()
