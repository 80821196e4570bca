"""Fixtures that several test modules share.

What is expensive (stores, trainings) is built once per test run, also where pytest-xdist runs
several processes; tests that write get a copy. Imports that take seconds stand in the fixtures
that need them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

import pipelines  # noqa: F401 (how Dask starts workers has to be set before its import)

if TYPE_CHECKING:
    import xarray as xr

    from bragg_data.campaign import Campaign
    from bragg_data.refinement.rietveld import Refiner
    from bragg_data.store.repository import Store
    from catalog.tracking import Tracking
    from tests.small_bench import Bench

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of a job in a shell's background; the commands that are tested would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("tests", deadline=None)  # a loaded machine breaks no test
settings.load_profile("tests")

ROOT = Path(__file__).parents[1]
TEST_CLUSTER = ROOT / "deploy" / "slurm" / "test_cluster"

BuildOnce = Callable[[str, Callable[[Path], object]], Path]

MARKER_OF_FIXTURE = {
    "gsas2_location": "gsas2",
    "slurm": "slurm",
    "bench": "training",
    "empty_bench": "training",
    "nomad_refiner": "slow",
    "first_run": "slow",
}
LONG = ("slow", "training", "slurm", "cluster")
# Of a minute and more each, also those of few tests; the first trains the models that others read.
LONGEST = (
    "test_recipes", "test_simulate", "test_tutorials", "test_faults", "test_tracking_server",
    "test_recovery", "test_server_dies", "test_run", "test_reuse", "test_grow", "test_service",
    "test_robust", "test_slurm",
)  # fmt: skip
FIRST_COMMAND = "bragg run --limit 640"
# That command; its models are scored on fewer draws than a user's: each takes guided a second.
BRAGG_RUN = """
from pipelines.run import app
from pipelines.training.presets import Presets
app(obj=Presets(test_draws=20, comparison_draws=2, foreign_draws=10))
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they use; the longest modules begin, then most long tests.

    With several processes a module stays in one, which has its fixtures: where the long ones begin,
    no process ends long after the others. Where one builds what is shared, the others have other
    tests to run meanwhile.
    """
    long: Counter[Path] = Counter()
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKER_OF_FIXTURE:
                item.add_marker(MARKER_OF_FIXTURE[fixture])
        long[item.path] += any(item.get_closest_marker(name) for name in LONG)
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), -long[item.path]))


def pytest_collection() -> None:
    """Look for no garbage among what is imported."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave the imported modules, half a million objects, out of each later collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory: pytest.TempPathFactory, indices: Path) -> Iterator[None]:
    """A working directory for the commands' defaults, data/…, which stay out of the project's."""
    with contextlib.chdir(tmp_path_factory.mktemp("working")):
        Path("data").mkdir()
        Path("data/index").symlink_to(indices)
        yield


@pytest.fixture(scope="session")
def indices(build_once: BuildOnce) -> Path:
    """Directory of what simulators and libraries keep because it takes seconds to build."""
    return build_once("indices", lambda _: None)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> BuildOnce:
    """Build a directory once per test run: the others wait for it and read it.

    The way of pytest-xdist's documentation, "Making session-scoped fixtures execute only once".
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "shared"
    shared.mkdir(exist_ok=True)

    def built(name: str, build: Callable[[Path], object]) -> Path:
        directory, complete = shared / name, shared / f"{name}.complete"
        with FileLock(shared / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a build that failed
                directory.mkdir()
                build(directory)
                complete.touch()
        return directory

    return built


# ---- the small data set ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def campaign_file(build_once: BuildOnce) -> Path:
    from tests.small_store import write_campaign

    return build_once("campaign", write_campaign) / "small.toml"


@pytest.fixture(scope="session")
def small_campaign(campaign_file: Path) -> Campaign:
    from bragg_data.campaign import load_campaign

    return load_campaign(campaign_file)


@pytest.fixture(scope="session")
def simulate_into() -> Callable[[Store, Campaign, str], None]:
    """Simulate a campaign into a store and tag it, in this process."""
    from tests.small_store import simulate

    return simulate


@pytest.fixture(scope="session")
def small_store(small_campaign: Campaign, build_once: BuildOnce) -> Store:
    """To be read only."""
    from bragg_data.store.repository import Store
    from tests.small_store import TAG, simulate

    def build(directory: Path) -> None:
        simulate(Store(directory / "store", create=True), small_campaign, TAG)

    return Store(build_once("small", build) / "store")


@pytest.fixture(scope="session")
def small_dataset(small_store: Store) -> xr.Dataset:
    from tests.small_store import TAG

    return small_store.open(TAG)


@pytest.fixture(scope="session")
def nomad_refiner() -> Refiner:
    """Of the paper's campaign."""
    from bragg_data.campaign import load_campaign
    from bragg_data.refinement.rietveld import Refiner

    return Refiner(load_campaign("batio3-nomad"))


# ---- models trained on it ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def tracking_in(build_once: BuildOnce) -> Callable[[Path], Tracking]:
    """Make an MLflow database in a directory, as a copy: making a new one takes seconds."""
    from catalog.tracking import Tracking

    empty = build_once("database", lambda place: Tracking(f"sqlite:///{place}/mlflow.db"))

    def copied(directory: Path) -> Tracking:
        shutil.copy(empty / "mlflow.db", directory)
        return Tracking(f"sqlite:///{directory}/mlflow.db")

    return copied


@pytest.fixture(scope="module")
def trained(
    small_store: Store,
    build_once: BuildOnce,
    tracking_in: Callable[[Path], Tracking],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tracking:
    """One registered model, trained a little: a multitask network, one epoch. A copy per module."""
    from catalog.tracking import Tracking
    from tests.small_bench import train_multitask

    built = build_once("trained", lambda place: train_multitask(small_store, tracking_in(place)))
    directory = tmp_path_factory.mktemp("trained")
    shutil.copy(built / "mlflow.db", directory)
    return Tracking(f"sqlite:///{directory}/mlflow.db")


@pytest.fixture(scope="module")
def bench(
    small_store: Store,
    build_once: BuildOnce,
    tracking_in: Callable[[Path], Tracking],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    """All models, trained with short presets and registered. A copy per module."""
    from catalog.tracking import Tracking
    from tests.small_bench import Bench, train_all

    built = build_once("bench", lambda place: train_all(small_store, tracking_in(place), place))
    directory = shutil.copytree(
        built,
        tmp_path_factory.mktemp("bench"),
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("mlartifacts"),  # the database names them by absolute paths
    )
    return Bench(small_store, Tracking(f"sqlite:///{directory}/mlflow.db"), directory / "state")


@pytest.fixture(scope="module")
def everything(bench: Bench) -> str:
    """What the training of all models printed."""
    from tests.small_bench import PRINTED

    return (bench.state.parent / PRINTED).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def empty_bench(
    small_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    tracking_in: Callable[[Path], Tracking],
) -> Bench:
    """A registry without models, for modules that train some of their own."""
    from tests.small_bench import Bench

    directory = tmp_path_factory.mktemp("bench")
    return Bench(small_store, tracking_in(directory), directory / "state")


@pytest.fixture(scope="session")
def first_run(build_once: BuildOnce, indices: Path) -> Path:
    """What the first command of the first tutorial makes in an empty directory; to be copied.

    ``printed.txt`` holds its output. What the fast simulator computes once for the instrument is
    that of all tests.
    """

    def build(directory: Path) -> None:
        link_indices(directory, indices)
        bragg = [sys.executable, "-c", BRAGG_RUN, *FIRST_COMMAND.split()[2:]]
        with (directory / "printed.txt").open("w", encoding="utf-8") as printed:
            subprocess.run(bragg, cwd=directory, stdout=printed, check=True)

    return build_once("first-run", build)


def link_indices(directory: Path, indices: Path) -> None:
    """Let commands that work in a directory keep there what `indices` keeps for all tests."""
    for cache in ("index", "training/cache/draws"):
        (directory / "data" / cache).parent.mkdir(parents=True, exist_ok=True)
        (directory / "data" / cache).symlink_to(indices)


# ---- programs and services -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def gsas2_location() -> str | None:
    """Directory of GSAS-II as BRAGG_GSAS2_PATH names it; None is that of this interpreter.

    Without GSAS-II the tests are skipped.
    """
    from bragg_data.simulation.gsas2 import Gsas2Error, installed_version

    location = os.environ.get("BRAGG_GSAS2_PATH")
    try:
        installed_version(location)
    except Gsas2Error as error:
        pytest.skip(f"{type(error).__name__}: GSAS-II is not installed, or is broken")
    return location


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """A running SLURM with two nodes, to which SLURM_CONF points; yields its directory.

    Without SLURM's programs the tests are skipped, unless BRAGG_REQUIRE_SLURM=1 demands them.
    """
    # Not pytest's own directories, whose paths are too long for sockets.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        started = subprocess.run(
            [TEST_CLUSTER, "start", directory], capture_output=True, text=True, check=False
        )
        if started.returncode == os.EX_UNAVAILABLE and os.environ.get("BRAGG_REQUIRE_SLURM") != "1":
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        patch.setenv(*started.stdout.removeprefix("export ").strip().split("="))
        yield Path(directory)
        subprocess.run([TEST_CLUSTER, "stop", directory], check=True)


@pytest.fixture
def command(capsys):
    """Run a command line in this process: exit code, standard output, standard error."""
    from pipelines.cli.console import run

    def execute(app, *arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_:
                run(app, [*map(str, arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute
