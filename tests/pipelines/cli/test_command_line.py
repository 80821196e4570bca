"""The commands by their names, their help without heavy imports, and the options they share."""

import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from catalog.tracking import Tracking
from pipelines.__main__ import commands
from pipelines.cli.console import ServerError, command_line
from pipelines.cli.options import (
    DEFAULT_TRACKING_URI,
    DEFAULT_URI,
    ClusterError,
    ClusterOptions,
    SlurmOptions,
    expand_options,
)

PROJECT = Path(__file__).parents[3]
HEAVY = {
    "dask",
    "distributed",
    "icechunk",
    "matplotlib",
    "mlflow",
    "numba",
    "pandas",
    "sklearn",
    "torch",
    "xarray",
    "zarr",
}

# One process imports what all commands share, and a fork of it what one command adds.
HELP = """
import os, sys
from pipelines.__main__ import main
for name in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv = ["bragg", name, "--help"]
        try:
            main()
        finally:
            print("modules", *{name.partition(".")[0] for name in sys.modules}, end="\\0")
    assert os.wait()[1] == 0, name
"""


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """What each command prints with --help, and the modules that are loaded then."""
    names = sorted(commands())
    words = [name.replace("_", "-") for name in names]
    run = [sys.executable, "-c", HELP, *words]
    shown = subprocess.run(run, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return dict(zip(names, shown.split("\0")[:-1], strict=True))


def bragg(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_listed_with_a_sentence() -> None:
    names = {path.stem for path in (PROJECT / "pipelines").glob("[a-z]*.py")}
    assert set(commands()) == names
    for arguments in ((), ("--help",)):
        listed = bragg(*arguments)
        assert (listed.returncode, listed.stderr) == (0, "")
        lines = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines()[2:-2])
        assert {name.replace("-", "_"): text.strip() for name, text in lines.items()} == commands()
    assert all(len(line) > 20 and line.endswith(".") for line in commands().values())


def test_version_is_that_of_the_package() -> None:
    assert bragg("--version").stdout == f"bragg {version('bragg')}\n"


@pytest.mark.parametrize(
    ("name", "near"),
    [("simulte", "simulate"), ("compare-simulator", "compare_simulators"), ("xyz", "bragg --help")],
)
def test_unknown_command_is_a_single_sentence_with_near_names(name: str, near: str) -> None:
    refused = bragg(name)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"Error: There is no command '{name}'.")
    assert refused.stderr.count("\n") == 1
    assert near in refused.stderr


@pytest.mark.slow
def test_command_gets_its_arguments_and_returns_its_exit_code(tmp_path: Path) -> None:
    refused = bragg("compare-simulators", "--png", str(tmp_path / "missing" / "x.png"))
    assert refused.returncode == 2
    assert "in a directory that exists" in refused.stderr


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_imports_no_heavy_library(name: str, help_of: dict[str, str]) -> None:
    text, _, modules = help_of[name].rpartition("modules ")
    assert f"Usage: bragg {name.replace('_', '-')}" in text
    assert not HEAVY & set(modules.split())


def test_commands_are_written_with_the_options_that_differ_from_the_default() -> None:
    assert command_line("train", store=DEFAULT_URI, tracking=DEFAULT_TRACKING_URI) == (
        "python -m pipelines.train"
    )
    typed = command_line("inspect", "v1", "--png", Path("a b.png"), store="/x", tracking="http://y")
    assert typed == (
        "python -m pipelines.inspect v1 --png 'a b.png' --store /x --tracking http://y"
    )


@dataclass(frozen=True)
class Inner:
    depth: Annotated[int, typer.Option(min=0)] = 1
    names: Annotated[list[str], typer.Option("--name")] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    width: float = 2.0
    inner: Inner = field(default_factory=Inner)


WIDE = Outer(width=9.0)


def test_fields_of_dataclasses_become_options() -> None:
    single = typer.Typer(add_completion=False)
    received: list[tuple[str, Outer, bool]] = []

    @single.command()
    @expand_options
    def command(
        first: Annotated[str, typer.Argument()], outer: Outer = WIDE, flag: bool = False
    ) -> None:
        """Do something."""
        received.append((first, outer, flag))

    runner = CliRunner()
    for arguments, expected in (
        (["x"], ("x", Outer(width=9.0), False)),
        (
            ["x", "--flag", "--width", "3", "--depth", "4", "--name", "a", "--name", "b"],
            ("x", Outer(3.0, Inner(4, ["a", "b"])), True),
        ),
    ):
        assert runner.invoke(single, arguments, catch_exceptions=False).exit_code == 0
        assert received.pop() == expected
    assert runner.invoke(single, ["x", "--depth", "-1"]).exit_code == 2
    assert "Do something." in runner.invoke(single, ["--help"]).output


def test_slurm_options_belong_to_slurm() -> None:
    slurm = SlurmOptions(jobs="2:4", environment=["A=b c", "B="], directives=["--exclusive"])
    assert slurm.job_limits == (2, 4)
    assert slurm.variables == {"A": "b c", "B": ""}
    assert ClusterOptions("slurm", slurm=slurm).name == "slurm"
    message = r"--jobs, --directive, --environment: only for --cluster slurm, .*--cluster local"
    with pytest.raises(ClusterError, match=message):
        ClusterOptions("local", slurm=slurm)
    with pytest.raises(ClusterError, match=r"--jobs.*--cluster local"):
        ClusterOptions(None, slurm=slurm)
    with pytest.raises(ClusterError, match="takes NAME=VALUE, not '=x'"):
        SlurmOptions(environment=["=x"])
    with pytest.raises(ClusterError, match="There is no cluster 'cloud'"):
        ClusterOptions("cloud")
    with pytest.raises(ClusterError, match="at least 1, belongs to the cluster 'local'"):
        ClusterOptions("slurm", workers=2)


@pytest.mark.parametrize("command", ["ui", "serve", "tracking_server serve"])
def test_a_port_that_is_taken_is_named(
    command: str, tmp_path: Path, tracking_in: Callable[[Path], Tracking]
) -> None:
    name, *rest = command.split()
    app = import_module(f"pipelines.{name}").app
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        database = tracking_in(tmp_path)
        place = ["--home", str(tmp_path)] if rest else ["--tracking", database.uri]
        result = CliRunner().invoke(app, [*rest, "--port", port, *place])
    assert isinstance(result.exception, ServerError)
    assert port in str(result.exception)
    assert "--port" in str(result.exception)
