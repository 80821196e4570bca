"""Samples whose patterns the store has already: where those are, and how they are copied."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xarray as xr

from bragg_data.arrays import Floats32, Indices, Mask
from bragg_data.campaign import Campaign, Samples
from bragg_data.store import schema
from bragg_data.store.repository import Snapshot, Store, open_dataset, storage_errors
from bragg_data.store.verification import read_block


class Donor(NamedTuple):
    """A data set from which patterns are copied, by the URI of its store, for other processes."""

    uri: str
    snapshot: Snapshot


@dataclass(frozen=True)
class Reuse:
    """Where the patterns of n samples are: the number of their donor, and their row in it."""

    donors: tuple[Donor, ...]
    donor: Indices  # (n,), -1 where no donor has the sample
    row: Indices  # (n,)

    def __getitem__(self, rows: slice) -> "Reuse":
        return Reuse(self.donors, self.donor[rows], self.row[rows])

    @property
    def new(self) -> Mask:
        """The samples that no donor has, shape (n,)."""
        return self.donor < 0

    @property
    def copied(self) -> dict[Snapshot, int]:
        """How many patterns are copied from each donor that has any."""
        counts = np.bincount(self.donor[~self.new], minlength=len(self.donors)).tolist()
        snapshots = (donor.snapshot for donor in self.donors)
        return {s: count for s, count in zip(snapshots, counts, strict=True) if count}

    def read(self) -> Floats32:
        """Return the patterns of the m samples that are not new, in their order: (m, points).

        The rows lie scattered over the chunks of the donors, each of which is read as a whole, and
        its hash checked. Raises a StoreError if a donor is gone or damaged.
        """
        places, parts = [], []
        for number, donor in enumerate(self.donors):
            places_in_donor = np.flatnonzero(self.donor == number)
            if not len(places_in_donor):
                continue
            dataset, samples = _open(donor)
            blocks, rows = np.divmod(self.row[places_in_donor], dataset.attrs["rows_per_chunk"])
            for block in np.unique(blocks).tolist():
                here = blocks == block
                places.append(places_in_donor[here])
                parts.append(read_block(dataset, samples, block)[rows[here]])
        return np.concatenate(parts)[np.argsort(np.concatenate(places))]


def find_reusable(
    store: Store, campaign: Campaign, simulated_by: Mapping[str, str], limit: int | None = None
) -> Reuse:
    """Find the samples of a campaign (the first ones) that other data sets of the store have.

    These have the attributes ``simulated_by``: the simulator, its version, and how it is called.
    The same sample has the same structure (:attr:`~bragg_data.campaign.Campaign.phase_identities`)
    and the same bits of its cell. Unfinished data sets count as far as they are done.
    """
    samples = campaign.samples[slice(limit)]
    by = simulated_by["simulator"], simulated_by["simulator_version"]
    identity = campaign.identity(*by, limit)
    candidates: list[tuple[Donor, Indices]] = []
    for snapshot, attrs in store.snapshots():
        same = all(attrs.get(name) == value for name, value in simulated_by.items())
        if same and attrs["identity"] != identity:
            donor = Donor(store.uri, snapshot)
            candidates.append((donor, _rows(donor, campaign, samples)))
    # As few donors as possible.
    candidates.sort(key=lambda entry: -int((entry[1] >= 0).sum()))
    number, row = np.full(len(samples), -1, np.intp), np.full(len(samples), -1, np.intp)
    for position, (_, rows) in enumerate(candidates):
        first = (number < 0) & (rows >= 0)
        number[first], row[first] = position, rows[first]
    return Reuse(tuple(donor for donor, _ in candidates), number, row)


def _rows(donor: Donor, campaign: Campaign, samples: Samples) -> Indices:
    """Return the row of each sample in a donor, -1 where there is none, shape (n,)."""
    try:
        dataset, known = _open(donor)
        done = dataset.status.values == schema.DONE
        identities = schema.campaign_of(dataset).phase_identities
    except (RuntimeError, ValueError):  # damaged, or of a campaign that cannot be read any more
        return np.full(len(samples), -1, np.intp)
    requested = campaign.phase_identities
    rows: dict[tuple[str, bytes], int] = {}
    for code, identity in enumerate(identities):
        if identity in requested:
            of_phase = np.flatnonzero(done & (known.phase == code)).tolist()
            rows |= {(identity, known.cells[row].tobytes()): row for row in of_phase}
    keys = zip(samples.phase.tolist(), samples.cells, strict=True)
    return np.array([rows.get((requested[code], cell.tobytes()), -1) for code, cell in keys])


@lru_cache(maxsize=8)
def _open(donor: Donor) -> tuple[xr.Dataset, Samples]:
    """Open a donor, once per process, and read its labels."""
    snapshot = donor.snapshot
    with storage_errors(f"opening snapshot {snapshot.snapshot_id} of {donor.uri}"):
        repository = Store(donor.uri).repository
        session = repository.readonly_session(snapshot_id=snapshot.snapshot_id)
        dataset = open_dataset(session, snapshot.group)
        return dataset, schema.samples_of(dataset)
