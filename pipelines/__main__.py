"""List the commands."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from rich.table import Table

from pipelines.cli.console import console, fail, say


def commands() -> dict[str, str]:
    """Return the first line of each command's documentation, by its name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        # Reading is enough: importing all of them would take seconds.
        if '__name__ == "__main__"' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> int:
    """Print the commands with a line each; the exit code is 2 if one was named in vain."""
    if len(sys.argv) > 1:
        fail(
            f"'python -m pipelines' only lists the commands. Type python -m pipelines."
            f"{sys.argv[1]} to run one of that name."
        )
        return 2
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, line in commands().items():
        table.add_row(f"[cyan]python -m pipelines.{name}[/]", line)
    console.print(table)
    say("\nEach one explains its options with --help.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
