"""Options that several commands share: names, help and defaults, in one place.

A single option is an annotated type. Options that belong together are a frozen dataclass whose
fields are annotated types; :func:`expand_options` makes options of the fields::

    def main(store: StoreOption = DEFAULT_URI, *, cluster: ClusterOptions) -> None: ...

    app = app_of(main)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Option, Typer

from bragg_data.defaults import DEFAULT_CAMPAIGN as DEFAULT_CAMPAIGN
from bragg_data.defaults import DEFAULT_URI as DEFAULT_URI
from bragg_data.defaults import PATTERN_SECONDS
from catalog import DEFAULT_TRACKING_URI as DEFAULT_TRACKING_URI
from catalog import without_credentials

if TYPE_CHECKING:
    from bragg_data.measurement.readers import Reading
    from bragg_data.store.repository import Store

_gsas2 = partial(Option, rich_help_panel="GSAS-II")
_cluster = partial(Option, rich_help_panel="Where to compute")
_slurm = partial(Option, rich_help_panel="SLURM")
_on_draws = partial(Option, rich_help_panel="Simulated measurements")
_draws = partial(_on_draws, min=0, metavar="N")

StoreOption = Annotated[
    str, Option("--store", metavar="URI", help="Directory of the store, or s3://BUCKET/PREFIX.")
]
TrackingOption = Annotated[
    str,
    Option(
        "--tracking",
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        parser=without_credentials,
        help="MLflow's URI.",
    ),
]
DataOption = Annotated[
    str | None, Option("--data", metavar="TAG", help="Data set; by default the largest, newest.")
]
CampaignOption = Annotated[
    str, Option("--campaign", metavar="NAME|FILE.toml", help="Built-in campaign, or a file.")
]
ModelOption = Annotated[
    str | None,
    Option("--model", metavar="URI", help="models:/NAME@ALIAS or /VERSION, or packaged:NAME."),
]
RECORD_MEGABYTES = 500.0
RecordOption = Annotated[
    Path | None, Option("--record", metavar="FOLDER", help="Record inputs and answers in a folder.")
]
RecordLimitOption = Annotated[
    float | None, Option("--record-limit", min=1, metavar="MB", help="Size; at first 500.")
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON and nothing else.")]
YesOption = Annotated[bool, Option("--yes", help="Begin without asking, however long.")]
TagOption = Annotated[str | None, Option("--tag", help="Snapshot's name; by default NAME-vN.")]
WorkersOption = Annotated[int | None, Option("--workers", min=1, help="Processes on this machine.")]

# Workers that may die with a task before it counts as the reason. Dask's 3 are too few where jobs
# are preempted or cancelled: every death counts for all the tasks that the worker had in hand.
ALLOWED_FAILURES = 5


class ClusterError(RuntimeError):
    """A cluster that does not exist, cannot be reached, or refuses the work."""


Gsas2PathOption = Annotated[
    Path | None, _gsas2(envvar="BRAGG_GSAS2_PATH", help="Directory with the package GSASII.")
]


@dataclass(frozen=True)
class Gsas2Command:
    """Where GSAS-II is, and how long it may take."""

    gsas2_path: Gsas2PathOption = None
    pattern_limit: Annotated[
        float, _gsas2(min=0.0, metavar="SECONDS", help="Time limit of a pattern.")
    ] = PATTERN_SECONDS


@dataclass(frozen=True)
class ReadingOptions:
    """How measured profiles are read, all banks of them."""

    instrument: Annotated[
        Path | None,
        Option(metavar="FILE.instprm", help="Calibration of the measurement (recommended)."),
    ] = None
    two_theta: Annotated[
        float | None,
        Option(
            min=-180,
            max=180,
            help="2θ (°): of several banks by their headers, or of a bank whose file states none.",
        ),
    ] = None
    position: Annotated[
        int | None, Option(min=1, help="Only the bank at this place of the files, from 1.")
    ] = None
    x_unit: Annotated[
        Literal["us", "ms", "s", "d", "Q"] | None,
        Option(help="Unit of the axis, if a file does not name it."),
    ] = None
    bin_edges: Annotated[
        bool | None,
        Option(
            "--bin-edges/--bin-centres",
            help="Whether the files list lower edges of bins, or their centres.",
        ),
    ] = None
    block: Annotated[
        str | None, Option(metavar="NAME", help="Data block, of a CIF that holds several.")
    ] = None

    @property
    def reading(self) -> Reading:
        """What the files leave open."""
        from bragg_data.measurement.readers import Reading

        return Reading(self.position, self.x_unit, self.bin_edges, self.block)

    @property
    def words(self) -> list[str]:
        """The options as they are typed, without the instrument file."""
        values = {
            "--two-theta": self.two_theta,
            "--position": self.position,
            "--x-unit": self.x_unit,
            "--block": self.block,
        }
        typed = [word for name, v in values.items() if v is not None for word in (name, f"{v}")]
        bins = {None: [], True: ["--bin-edges"], False: ["--bin-centres"]}
        return typed + bins[self.bin_edges]


@dataclass(frozen=True)
class ProfileOptions(ReadingOptions):
    """How measured profiles are read, all banks of them or one."""

    bank: Annotated[int | None, Option(help="Only this bank of the files.")] = None

    @property
    def words(self) -> list[str]:
        """The options as they are typed, without the instrument file."""
        return ([] if self.bank is None else ["--bank", f"{self.bank}"]) + super().words


@dataclass(frozen=True)
class SlurmOptions:
    """Resources to request from SLURM; None stands for the value of Dask's configuration.

    Dask reads its configuration, section ``jobqueue.slurm``, from ``~/.config/dask/*.yaml``;
    ``deploy/slurm/jobqueue.yaml`` is a template with a comment on each entry.

    Between the least and the greatest number of `jobs` there are as many as there are tasks; one
    that reaches its `walltime` is replaced. Each of its `cores` gets a worker process with one
    thread; they share its `memory`. `interface` is the network that this machine and the nodes
    share, `host` this machine's address if not that of the interface, `python` by default the one
    that runs here, by the same path. Credentials and logs go into `shared_directory`, by default
    the home directory. `directives` follow those of the configuration. Raises `ClusterError` if
    `jobs` or `environment` cannot be parsed.
    """

    jobs: Annotated[str, _slurm(metavar="MIN:MAX", help="Jobs at a time, as in 2:8.")] = "1:8"
    queue: Annotated[str | None, _slurm(help="Partition.")] = None
    account: Annotated[str | None, _slurm(help="Account.")] = None
    walltime: Annotated[str | None, _slurm(metavar="HH:MM:SS", help="Time limit of a job.")] = None
    cores: Annotated[int | None, _slurm(min=1, help="Cores of a job.")] = None
    memory: Annotated[str | None, _slurm(help="Memory of a job, as in 8GB.")] = None
    directives: Annotated[
        list[str],
        _slurm("--directive", metavar="TEXT", help="Additional #SBATCH line (repeatable)."),
    ] = field(default_factory=list)
    environment: Annotated[
        list[str],
        _slurm(metavar="NAME=VALUE", help="Environment variable of the workers (repeatable)."),
    ] = field(default_factory=list)
    interface: Annotated[str | None, _slurm(help="Network interface, as in ib0.")] = None
    host: Annotated[str | None, _slurm(help="Address of this machine for the nodes.")] = None
    python: Annotated[str | None, _slurm(help="Python on the nodes.")] = None
    shared_directory: Annotated[Path | None, _slurm(help="Directory the nodes read too.")] = None

    def __post_init__(self) -> None:
        _ = self.job_limits, self.variables

    @property
    def job_limits(self) -> tuple[int, int]:
        """Least and greatest number of jobs, from ``MIN:MAX`` or one number for both."""
        least, _, most = self.jobs.partition(":")
        try:
            limits = int(least), int(most or least)
        except ValueError:
            limits = -1, -1
        if not 0 <= limits[0] <= limits[1] or limits[1] < 1:
            raise ClusterError(
                f"'{self.jobs}' is not a number of jobs. Write MIN:MAX with 0 ≤ MIN ≤ MAX and "
                "1 ≤ MAX, as in 2:8, or one number for both."
            )
        return limits

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the workers by their names."""
        variables = {}
        for text in self.environment:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise ClusterError(f"--environment takes NAME=VALUE, not '{text}'.")
            variables[name] = value
        return variables


@dataclass(frozen=True)
class ClusterOptions:
    """Where tasks run; raises `ClusterError` for an unknown cluster, or options of another one."""

    cluster: Annotated[
        str | None,
        _cluster(
            metavar="local|slurm|tcp://HOST:PORT",
            help="This machine, SLURM, or a running Dask scheduler.",
        ),
    ] = "local"
    """None where the command chooses: this process for little work, else ``local``."""
    workers: Annotated[int | None, _cluster(min=1, help="Processes; default: one per core.")] = None
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    def __post_init__(self) -> None:
        check_cluster(self.name, self.workers)
        default = SlurmOptions()
        changed = [
            "--directive" if option.name == "directives" else f"--{option.name.replace('_', '-')}"
            for option in fields(self.slurm)
            if getattr(self.slurm, option.name) != getattr(default, option.name)
        ]
        if changed and self.name != "slurm":
            raise ClusterError(
                f"{', '.join(changed)}: only for --cluster slurm, and this is --cluster "
                f"{self.name}. Choose --cluster slurm, or omit them."
            )

    @property
    def name(self) -> str:
        """Name or address of the cluster."""
        return self.cluster or "local"


_DRAWS = "Draws of each phase, to check probabilities and intervals. 5000 take 5 minutes."
_FOREIGN = "Foreign profiles of each kind, to check their rejection. 200 take 10 minutes."
_REFINED = "Draws of each phase to refine from several starts. 500 take 20 minutes."
_BANK = "Instrument file with another bank, whose profiles are foreign too."
_CLUSTER = "Where they are drawn and predicted."


@dataclass(frozen=True)
class DrawOptions:
    """Numbers of simulated measurements, and where they are drawn and predicted."""

    draws: Annotated[int, _draws(help=_DRAWS)] = 0
    foreign: Annotated[int, _draws(help=_FOREIGN)] = 0
    refined_draws: Annotated[int, _draws(help=_REFINED)] = 0
    other_bank: Annotated[Path | None, _on_draws(metavar="FILE", help=_BANK)] = None
    other: Annotated[Path | None, Option(hidden=True)] = None  # deprecated: other_bank
    cluster: Annotated[str, _on_draws(metavar="local|slurm|ADDRESS", help=_CLUSTER)] = "local"

    @property
    def requested(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.draws or self.foreign or self.refined_draws)

    @property
    def bank_file(self) -> Path | None:
        """Instrument file with another bank, by either name of the option."""
        return self.other_bank or self.other


@dataclass(frozen=True)
class WatchOptions:
    """How the record of a service's answers is watched."""

    known: Annotated[
        Path | None,
        Option(metavar="CSV", help="Known cells: columns file (or pattern), a, b, c in Å."),
    ] = None
    reference: Annotated[
        int, Option(min=20, help="First answers of a model, which later ones are compared with.")
    ] = 100
    rate: Annotated[
        float, Option(min=1e-9, max=0.01, help="False alarms per profile, of all signals.")
    ] = 1e-4


class OutputError(ValueError):
    """A file that cannot be written where it was named."""


def check_writable(*paths: Path | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise an OutputError for a directory, a file in none that exists, and one of the inputs."""
    read = {Path(file).resolve() for file in inputs if file is not None}
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise OutputError(f"{path} cannot be written: name a file in a directory that exists.")
        if path is not None and path.resolve() in read:
            raise OutputError(
                f"{path} is one of the inputs: name another file for what is written."
            )


def check_cluster(cluster: str, workers: int | None = None) -> None:
    """Raise a ClusterError for an unknown cluster, or one that takes no number of workers."""
    if cluster not in ("local", "slurm") and not cluster.startswith(("tcp://", "tls://")):
        raise ClusterError(
            f"There is no cluster '{cluster}'. Choose local, slurm, or the address of a running "
            "Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT."
        )
    if workers is not None and (cluster != "local" or workers < 1):
        raise ClusterError(
            f"{workers} workers on '{cluster}': a number of workers, at least 1, belongs to the "
            "cluster 'local'. SLURM takes a number of jobs, a running scheduler has its workers."
        )


def app_of(command: Callable[..., None]) -> Typer:
    """Return an app with one command, whose options :func:`expand_options` makes."""
    app = Typer(add_completion=False)
    app.command()(expand_options(command))
    return app


def expand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace each dataclass among a command's parameters by one option for each of its fields.

    The fields are annotated for Typer or are such dataclasses themselves. The default of the
    command's parameter, if any, holds the options' defaults.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    options = [option for parameter in parameters.values() for option in _options(parameter)]

    def expanded(**values: Any) -> Any:
        arguments = ((name, p.annotation) for name, p in parameters.items())
        return command(**{name: _collected(name, kind, values) for name, kind in arguments})

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
    for name, annotation in get_type_hints(group, include_extras=True).items():
        option = parameter.replace(name=name, annotation=annotation, default=getattr(default, name))
        yield from _options(option)


def _collected(name: str, annotation: Any, values: dict[str, object]) -> object:
    if not is_dataclass(annotation):
        return values[name]
    group: Any = annotation
    entries = get_type_hints(group, include_extras=True).items()
    return group(**{entry: _collected(entry, kind, values) for entry, kind in entries})


def default_tag(store: Store) -> str:
    """Return the tag of the largest simulated data set of a store; of several the newest."""
    from bragg_data.store.measured import SIMULATOR
    from bragg_data.store.repository import StoreError

    datasets = {tag: store.open(tag.name) for tag in store.tags()}
    simulated = {t: d for t, d in datasets.items() if d.attrs["simulator"] != SIMULATOR}
    if not simulated:
        raise StoreError(
            f"The store {store.uri} holds no finished data set yet. Make one with: "
            f"python -m pipelines.simulate"
        )
    return max(simulated, key=lambda tag: (simulated[tag].sizes["sample"], tag.written_at)).name
