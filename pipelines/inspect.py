"""Show what a file was recognised as, or what a store holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from typer import Argument, Option

from pipelines.cli import options
from pipelines.cli.console import command_line, next_commands, print_json, run, say

if TYPE_CHECKING:
    import xarray as xr

_SUFFIXES = (  # of files, where a name that is none is not a snapshot's
    *(".gsa", ".gss", ".gda", ".fxye", ".xye", ".xy", ".dat", ".csv", ".txt", ".nxs", ".h5"),
    *(".hdf5", ".hdf", ".instprm", ".prm", ".iparm", ".exp", ".irf", ".pcr", ".cif", ".toml"),
)


def main(
    name: Annotated[
        str | None,
        Argument(
            metavar="[FILE|TAG]",
            help="A profile, instrument file, CIF, NeXus or campaign file; or a snapshot of the "
            "store. By default all snapshots are listed.",
        ),
    ] = None,
    *,
    profile: options.ProfileOptions,
    store: options.StoreOption = options.DEFAULT_URI,
    as_json: options.JsonOption = False,
    png: Annotated[
        Path | None, Option(metavar="FILE", help="Draw patterns (of the last snapshot).")
    ] = None,
    labels: Annotated[
        Path | None,
        Option(metavar="FILE.parquet", help="Write the labels (of the last snapshot) as Parquet."),
    ] = None,
    croissant: Annotated[
        Path | None,
        Option(
            metavar="FOLDER", help="Write labels.parquet and a croissant.json that describes it."
        ),
    ] = None,
    check: Annotated[
        bool, Option("--verify", help="Read all of the store and compare the hashes.")
    ] = False,
) -> None:
    """Show what a file was recognised as, or what a store holds.

    Of a file: facility, format, banks, unit, range of d, counts, calibration and resolution,
    structures, and anything suspicious. Of a store: snapshots, counts, ranges, sizes, provenance, a
    few patterns; JSON is then a list with an object for each tag.
    """
    path = None if name is None else Path(name)
    if path is not None and (path.exists() or path.suffix.lower() in _SUFFIXES):
        _inspect_file(path, profile, as_json=as_json)
    else:
        requested = {"patterns": png, "labels": labels, "Croissant": croissant}
        files = {what: file for what, file in requested.items() if file is not None}
        _inspect_store(name, store, files, as_json=as_json, check=check)


def _inspect_file(path: Path, profile: options.ProfileOptions, *, as_json: bool) -> None:
    from bragg_data.recognition import Choice, recognise
    from pipelines.inspection.report import report_of, to_json
    from pipelines.inspection.tables import print_file

    choice = Choice(profile.bank, profile.two_theta, profile.reading, profile.instrument)
    file = recognise(path, choice)
    report = report_of(file)
    if as_json:
        print_json(to_json(report))
    else:
        print_file(file, report, profile.words)


def _inspect_store(
    tag: str | None, store: str, files: Mapping[str, Path], *, as_json: bool, check: bool
) -> None:
    from bragg_data.store.repository import Store, StoreError, storage_errors
    from bragg_data.store.verification import verify
    from pipelines.snapshots import tables

    repository = Store(store)
    tags = repository.tags()
    if tag is not None:
        repository.open(tag)  # refuses an unknown tag
        tags = [known for known in tags if known.name == tag]
    if files and not tags:
        raise StoreError(f"{repository.uri} has no tags yet, so there is nothing to write.")
    for what, file in files.items():
        with storage_errors(f"writing {file}"):
            _write(what, repository.open(tags[-1].name), file)
    summaries = [tables.summary_of(repository, known) for known in tags]
    if check:
        for known in tags:
            verify(repository.open(known.name))
    if as_json:
        print_json(summaries)
        return
    say(f"Store {escape(repository.uri)}")
    if tag is not None:
        tables.print_snapshot(summaries[0], repository.open(tag))
    else:
        if summaries:
            tables.print_tags(summaries)
        else:
            say(f"No snapshots yet. Make one with: {command_line('simulate')}")
        tables.print_unfinished(repository)
    if check:
        names = ", ".join(known.name for known in tags) or "no snapshot"
        say(f"Verified, byte for byte what was written: {names}")
    for what, file in files.items():
        say(f"Written: {what} of {tags[-1].name} in {escape(str(file))}")
    if tags and tag is None:
        newest = "inspect", tags[-1].name
        next_commands(
            (command_line(*newest, store=store), "its ranges and provenance"),
            (command_line(*newest, "--verify", store=store), "read and check it all"),
        )


def _write(what: str, dataset: xr.Dataset, file: Path) -> None:
    from pipelines.snapshots import exchange, figures

    write = {
        "patterns": figures.draw_patterns,
        "labels": exchange.write_labels,
        "Croissant": exchange.write_croissant,
    }
    write[what](dataset, file)


app = options.app_of(main)

if __name__ == "__main__":
    run(app)
