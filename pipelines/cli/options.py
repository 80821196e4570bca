"""Options that several commands share: names, help and defaults, in one place.

A single option is an annotated type. Options that belong together are a frozen dataclass whose
fields are annotated types; :func:`expand_options` makes options of the fields::

    @app.command()
    @expand_options
    def main(store: StoreOption = DEFAULT_URI, *, cluster: ClusterOptions) -> None:
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from bragg_data.defaults import DEFAULT_CAMPAIGN, DEFAULT_URI, PATTERN_SECONDS
from catalog.defaults import DEFAULT_TRACKING_URI
from pipelines.cluster.options import ClusterOptions, SlurmOptions

__all__ = [
    "DEFAULT_CAMPAIGN",
    "DEFAULT_TRACKING_URI",
    "DEFAULT_URI",
    "CampaignOption",
    "ClusterOptions",
    "DataOption",
    "Gsas2Command",
    "JsonOption",
    "ModelOption",
    "ProfileOptions",
    "SlurmOptions",
    "StoreOption",
    "TrackingOption",
    "YesOption",
    "command_line",
    "expand_options",
]

_Result = TypeVar("_Result")

StoreOption = Annotated[
    str, typer.Option("--store", metavar="URI", help="Directory or file:// URI of the store.")
]
TrackingOption = Annotated[
    str,
    typer.Option(
        "--tracking", metavar="URI", envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="TAG", help="Tag of the data set; by default the largest, newest one."
    ),
]
CampaignOption = Annotated[
    str,
    typer.Option("--campaign", metavar="NAME|FILE.toml", help="A built-in campaign, or a file."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="URI", help="models:/NAME@ALIAS or models:/NAME/VERSION."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else, for scripts.")
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Begin without asking, however long it takes.")
]


@dataclass(frozen=True)
class Gsas2Command:
    """Where GSAS-II is, and how long it may take."""

    gsas2_path: Annotated[
        Path | None,
        typer.Option(
            envvar="BRAGG_GSAS2_PATH",
            rich_help_panel="GSAS-II",
            help="Directory that holds the package GSASII, if Python cannot import it.",
        ),
    ] = None
    pattern_limit: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", rich_help_panel="GSAS-II", help="Time limit of a pattern."
        ),
    ] = PATTERN_SECONDS


@dataclass(frozen=True)
class ProfileOptions:
    """How measured profiles are read."""

    instrument: Annotated[
        Path | None,
        typer.Option(metavar="FILE.instprm", help="Calibration of the measurement (recommended)."),
    ] = None
    bank: Annotated[int | None, typer.Option(help="Only this bank of the files.")] = None
    two_theta: Annotated[
        float | None,
        typer.Option(
            min=0, max=180, help="Scattering angle (°) of the bank, if the file does not state it."
        ),
    ] = None


def expand_options(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Replace each dataclass among a command's parameters by one option for each of its fields.

    Parameters
    ----------
    command
        Its annotations name the dataclasses, whose fields are annotated for Typer or are such
        dataclasses themselves. The parameter's default, if any, holds the options' defaults.

    Returns
    -------
    The command for Typer: it takes the options, and calls `command` with the dataclasses.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    options = [option for parameter in parameters.values() for option in _options(parameter)]

    def expanded(**values: Any) -> _Result:
        return command(**{name: _collected(p, values) for name, p in parameters.items()})

    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    expanded.__module__ = command.__module__
    expanded.__annotations__ = {option.name: option.annotation for option in options}
    expanded.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return expanded


def _options(parameter: Parameter) -> Iterator[Parameter]:
    if not is_dataclass(parameter.annotation):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    group: Any = parameter.annotation
    default = group() if parameter.default is Parameter.empty else parameter.default
    for option in _fields(parameter):
        yield from _options(option.replace(default=getattr(default, option.name)))


def _fields(parameter: Parameter) -> Iterator[Parameter]:
    types = get_type_hints(parameter.annotation, include_extras=True)
    for entry in fields(parameter.annotation):
        yield Parameter(entry.name, Parameter.KEYWORD_ONLY, annotation=types[entry.name])


def _collected(parameter: Parameter, values: dict[str, object]) -> object:
    if not is_dataclass(parameter.annotation):
        return values[parameter.name]
    group: Any = parameter.annotation
    return group(**{entry.name: _collected(entry, values) for entry in _fields(parameter)})


def command_line(
    name: str, *arguments: object, store: str = DEFAULT_URI, tracking: str = DEFAULT_TRACKING_URI
) -> str:
    """Return what to type for a command of this project.

    Parameters
    ----------
    name
        Name of the command, such as ``simulate``.
    arguments
        Its arguments and options.
    store, tracking
        Added as ``--store`` and ``--tracking`` where they are not the default.
    """
    words = [str(argument) for argument in arguments]
    words += ["--store", store] if store != DEFAULT_URI else []
    words += ["--tracking", tracking] if tracking != DEFAULT_TRACKING_URI else []
    return " ".join([f"python -m pipelines.{name}", *map(shlex.quote, words)])
