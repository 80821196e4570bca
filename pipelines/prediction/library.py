"""The snapshot that a model was trained on, as a library of patterns to compare profiles with."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import xarray as xr
from rich.markup import escape

from bragg_data.arrays import AnyFloats, Mask
from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import Phase
from bragg_data.defaults import DEFAULT_URI
from bragg_data.refinement.linear_fit import simulator_of
from bragg_data.store.repository import StoreError, open_snapshot
from bragg_models.library.index import IndexUnavailableError, LibraryIndex, open_index
from bragg_models.library.search import Matches, library_match
from bragg_models.predictors import Predictor
from pipelines.cli.console import Progress, errors
from pipelines.prediction.result import Cell, LibraryCandidate, LibraryMatch
from pipelines.snapshots.verification import verify_snapshot

# Indices of libraries, relative to the working directory: they can be deleted at any time.
INDEX_DIRECTORY = Path("data/index")

_MAX_UNINDEXED = 8192  # patterns, which are read faster than an index is opened
_MAX_INDEX_QUERIES = 256  # profiles; more are answered faster by reading the whole store


@dataclass(frozen=True, eq=False)
class PatternLibrary:
    """A snapshot, whose patterns profiles are compared with."""

    dataset: xr.Dataset
    index: LibraryIndex | None = None  # for a few profiles; None to read the whole store


def match_library(
    library: PatternLibrary, prepared: AnyFloats, covered: Mask, *, progress: bool = False
) -> Matches:
    """Find the stored patterns that are most similar to some profiles.

    ``prepared``, shape (n, points), are profiles without background on the library's grid;
    ``covered``, of that shape, the points that were measured.
    """
    if library.index is not None and len(prepared) <= _MAX_INDEX_QUERIES:
        return library.index.match(prepared, covered)
    size = library.dataset.sizes["sample"]
    with Progress("Matching", size, "patterns", quiet=not progress) as bar:

        def on_chunk(done: int, total: int) -> None:
            bar.advance(size * done // total - bar.done)

        return library_match(library.dataset, prepared, covered, on_chunk=on_chunk)


def match_result(
    matches: Matches, row: int, phases: tuple[Phase, ...], snapshot: str
) -> LibraryMatch | None:
    """Return the match of one profile in a snapshot; None where it has no pattern of any phase."""
    candidates = []
    for code, cell in matches.starts(row):
        system, correlation = (
            phases[code].crystal_system.name,
            float(matches.correlation[row, code]),
        )
        candidate = LibraryCandidate(system, phases[code].name, correlation, Cell.from_array(cell))
        candidates.append(candidate)
    candidates.sort(key=lambda candidate: -candidate.correlation)
    return LibraryMatch(snapshot, tuple(candidates)) if candidates else None


def open_library(
    model: Predictor, store: str | None = None, *, progress: bool = False
) -> PatternLibrary | None:
    """Open the snapshot that a model was trained on; warn and return None if that is impossible.

    ``store`` is the address of the store, if it is not where the model was trained.
    """
    data = model.provenance.data
    try:
        dataset = open_snapshot(data.tag, store or data.uri or DEFAULT_URI)
        if dataset.attrs["content_hash"] == data.content_hash:
            verify_snapshot(dataset, quiet=not progress)
            return index_library(dataset, model.campaign, progress=progress)
        where = f"{data.tag} in {dataset.attrs['uri']}"
        reason = f"{where} is not the snapshot that the model was trained on."
    except StoreError as error:
        reason = str(error)
    message = f"The library match is left out: {escape(reason)}"
    errors.print(f"[yellow]Warning:[/] {message}", soft_wrap=True)
    return None


def index_library(
    dataset: xr.Dataset, campaign: Campaign, *, progress: bool = False
) -> PatternLibrary:
    """Return a snapshot with its index, which is built if there is none; a small one needs none."""
    size = dataset.sizes["sample"]
    if size <= _MAX_UNINDEXED:
        return PatternLibrary(dataset)
    simulator, index = simulator_of(campaign), None
    with ExitStack() as stack:

        @cache
        def bar() -> Progress:
            """Return the progress bar, which is shown if an index is built."""
            text = "Indexing the library"
            return stack.enter_context(Progress(text, size, "patterns", quiet=not progress))

        def on_batch(count: int) -> None:
            bar().advance(count)

        try:
            index = open_index(dataset, simulator, INDEX_DIRECTORY, on_batch=on_batch)
        except IndexUnavailableError as error:
            errors.print(f"{escape(str(error))} Continuing without an index.", soft_wrap=True)
    # The tables that the simulator builds on first use count as opening the library.
    cells = np.array([phase.cell for phase in campaign.phases])
    simulator.simulate(np.arange(len(cells)), cells)
    return PatternLibrary(dataset, index)
