"""Verifying a snapshot before something is computed from it."""

import xarray as xr

from bragg_data.store.repository import Store, StoreError
from bragg_data.store.verification import damaged_blocks, remember, state_of, verify_once
from pipelines.cli.console import Progress


def verify_snapshot(dataset: xr.Dataset, *, quiet: bool = False) -> None:
    """Read and hash a snapshot, opened by its tag, unless it is known to be intact.

    Raises a `StoreError` that names the first damaged block, and the command that repairs it.
    """
    bars: list[Progress] = []

    def on_block(count: int) -> None:
        if not bars:  # shown only where something is read
            name = f"Verifying {dataset.attrs['tag']}"
            bars.append(Progress(name, dataset.sizes["sample"], "patterns", quiet=quiet))
            bars[0].__enter__()
        bars[0].advance(count)

    try:
        verify_once(dataset, on_block)
    finally:
        for bar in bars:
            bar.__exit__()


def damage_of(store: Store, tag: str) -> list[str]:
    """Read and hash a whole data set; return a sentence for everything that is damaged."""
    problems = []
    try:
        dataset = store.open(tag)
        state = state_of(dataset)
        with Progress(f"Verifying {tag}", dataset.sizes["sample"], "patterns") as progress:
            problems += [str(error) for error in damaged_blocks(dataset, progress.advance)]
        if not problems:
            remember(dataset, state)
    except StoreError as error:
        problems.append(str(error))
    return problems
