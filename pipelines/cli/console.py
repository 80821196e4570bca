"""The console of the commands: results, errors in one sentence, progress, next commands."""

import io
import json
import os
import shlex
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NoReturn, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from typer.exceptions import TyperException

from bragg_data.defaults import DEFAULT_URI
from bragg_data.errors import first_line
from catalog import DEFAULT_TRACKING_URI
from catalog.database import problem_of

_WIDTH = None if sys.stdout.isatty() else 120  # in a file or pipe, wider than a terminal

console = Console(width=_WIDTH, highlight=False, soft_wrap=False)  # results
errors = Console(stderr=True, highlight=False)  # errors and warnings

_OURS = {"bragg_data", "bragg_models", "catalog", "pipelines", "__main__"}
_DEBUG = "BRAGG_DEBUG"
_PLAIN_SECONDS = 5.0  # between lines of progress where there is no terminal
_RATE_SECONDS = 30.0  # over which the rate is measured


class ServerError(RuntimeError):
    """A server that cannot be started."""


def check_can_listen(host: str, port: int) -> None:
    """Raise a ServerError if nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ServerError(
            f"Nothing can listen on {host}:{port}: the port is taken, or the address is not this "
            f"machine's. Name another with --port."
        ) from error


def say(text: str = "") -> None:
    """Print a line of rich markup, however long, without wrapping it."""
    console.print(text, soft_wrap=True)


def print_json(value: object) -> None:
    """Print plain JSON values; where the output cannot hold a name of a file, in ASCII."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def fail(message: str) -> None:
    """Print an error as one line on standard error."""
    errors.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)


def run(
    app: typer.Typer, arguments: Sequence[str] | None = None, name: str | None = None
) -> NoReturn:
    """Run a command line, by default that of this process, and leave the process.

    Errors that this project raises are one sentence on standard error and exit code 2; an
    unexpected one is exit code 1. With BRAGG_DEBUG set in the environment, the traceback comes
    first. Ctrl-C is exit code 130, SIGTERM 143; both let the command clean up.
    """
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # tables may hold names that are not UTF-8, too
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
    except TyperException as error:  # wrong usage
        fail(f"{error.format_message().rstrip('.')}. See --help.")
        sys.exit(2)
    except Exception as error:
        from bragg_data.store.reading import is_damage  # imported where it is needed: it takes long

        if os.environ.get(_DEBUG):
            traceback.print_exc()
        if type(error).__module__.partition(".")[0] in _OURS:
            fail(str(error))
            sys.exit(2)
        if type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy"):
            fail(problem_of(first_line(error), "of runs and models"))
            sys.exit(2)
        if is_damage(error):
            fail("What is stored is damaged. To find and repair it: bragg store verify")
            sys.exit(2)
        fail(f"{type(error).__name__}: {error}. This is not expected: {_DEBUG}=1 shows where.")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def print_rows(rows: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    errors.print(f"[yellow]Warning:[/] {escape(str(message))}", soft_wrap=True)


def command_line(
    name: str, *arguments: object, store: str = DEFAULT_URI, tracking: str = DEFAULT_TRACKING_URI
) -> str:
    """Return what to type for a command, with ``--store`` and ``--tracking`` unless default."""
    words = [str(argument) for argument in arguments]
    words += ["--store", store] if store != DEFAULT_URI else []
    words += ["--tracking", tracking] if tracking != DEFAULT_TRACKING_URI else []
    return " ".join([f"python -m pipelines.{name}", *map(shlex.quote, words)])


def next_commands(*commands: tuple[str, str]) -> None:
    """Print what to type next: pairs of a command and what it does."""
    say("\n[bold]Next[/]")
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        say(f"  [cyan]{escape(command.ljust(width))}[/]  {escape(what)}")


class Progress:
    """Progress with rate and time left: a live bar on a terminal, else a line every few seconds.

    `unit` is in the plural. Units that were `done` before do not count for the rate. If `quiet`,
    nothing is printed.
    """

    def __init__(
        self, task: str, total: int, unit: str, *, done: int = 0, quiet: bool = False
    ) -> None:
        self.task, self.total, self.unit, self.done = task, total, unit, done
        self.note, self._quiet = "", quiet
        self._began, self._first = time.monotonic(), done
        self._history: deque[tuple[float, int]] = deque([(self._began, done)])
        self._printed_at, self._line = -_PLAIN_SECONDS, ""
        self._bar: RichProgress | None = None
        if console.is_terminal and not quiet:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None)
            text = TextColumn("{task.fields[text]}")
            self._bar = RichProgress(*columns, text, console=console, expand=True)
            self._id = self._bar.add_task(task, total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.tick(last=True)
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time since the beginning, in seconds."""
        return time.monotonic() - self._began

    @property
    def summary(self) -> str:
        """What was done since the beginning: ``1,200 patterns in 8.3 s, 145 patterns/s``."""
        count, seconds = self.done - self._first, self.seconds
        rate = _three_digits(count / max(seconds, 1e-9))
        return f"{count:,} {self.unit} in {duration(seconds)}, {rate} {self.unit}/s"

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count some units as done; the note is the end of the line from now on."""
        self.done += count
        now = time.monotonic()
        self._history.append((now, self.done))
        while len(self._history) > 2 and now - self._history[0][0] > _RATE_SECONDS:
            self._history.popleft()
        self.tick(note)

    def tick(self, note: str | None = None, *, last: bool = False) -> None:
        """Show the present state; without a terminal only every few seconds."""
        self.note = self.note if note is None else note
        if self._bar:
            self._bar.update(self._id, completed=self.done, text=self._text())
        elif not self._quiet and (last or time.monotonic() - self._printed_at >= _PLAIN_SECONDS):
            line = f"{self.task}: {self._text()}"
            if line != self._line:
                say(line)
            self._printed_at, self._line = time.monotonic(), line

    def _text(self) -> str:
        share = self.done / max(self.total, 1)
        text = f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%})"
        (then, before), (now, after) = self._history[0], self._history[-1]
        if after > before and now > then:
            rate = (after - before) / (now - then)
            text += f", {_three_digits(rate)}/s"
            if self.done < self.total:
                text += f", {duration((self.total - self.done) / rate)} left"
        return f"{text}, {self.note}" if self.note else text


def _three_digits(value: float) -> str:
    """Return a number with three significant digits: 12,345, 67.8, 0.208."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a duration as text: 8.3 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
