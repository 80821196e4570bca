"""What changed from one data set to another: definition, cells, ranges, intensities."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from bragg_data.arrays import Array, Indices
from bragg_data.campaign import Campaign, Samples, number_text, ranges_text
from bragg_data.store.schema import campaign_of, free_ranges, samples_of

SAME_CELL = 1e-9  # cells whose six parameters differ by less, relatively, are the same sample
SAME_INTENSITY = 1e-6  # of the maximum; patterns that differ by less are the same: float32 rounds
MOST_COMPARED = 512  # patterns that are read of each data set, and no more chunks
_SHORT = 12  # characters of a SHA-256 that are shown


@dataclass(frozen=True)
class Difference:
    """A property with different values in the two definitions; None where it is missing."""

    what: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Comparison:
    """The intensities of samples that are in both data sets, on the same grid."""

    common: int  # samples in both
    compared: int  # of these, chosen evenly
    differing: int  # of these, by more than SAME_INTENSITY
    largest: float  # difference at a point, over the maximum of the pattern (of two, the higher)


@dataclass(frozen=True)
class PhaseChange:
    """The samples of one phase, which is known by its name.

    Cells that differ by less than SAME_CELL are the same. The ranges are the lowest and highest
    value of each free parameter, in ångström and degrees; empty without samples.
    """

    phase: str
    crystal_system: str  # if it changed, both
    both: int
    only_old: int
    only_new: int
    old_ranges: dict[str, tuple[float, float]]
    new_ranges: dict[str, tuple[float, float]]
    intensities: Comparison | None


@dataclass(frozen=True)
class Changes:
    """What changed between two data sets."""

    identical: bool  # their content hashes, and so all labels and intensities, are the same
    definition: tuple[Difference, ...]
    phases: tuple[PhaseChange, ...]  # of both, in the order of their codes, the new ones last
    same_grid: bool
    blocks: int  # of the new data set
    same_blocks: int  # of these, in the old one byte for byte
    intensities: Comparison | None  # None if there are none, the grids differ, or all is identical


def changes(old: xr.Dataset, new: xr.Dataset, *, max_compared: int = MOST_COMPARED) -> Changes:
    """Return what changed from one data set to another, of the same campaign or not.

    All labels are compared, and the intensities of at most ``max_compared`` common samples:
    an equal part of each phase, so that a rare one is looked at too. Raises `SchemaError`,
    `CampaignError`, `CrystalError` or `InstrumentError` if a campaign cannot be rebuilt.
    """
    identical = old.attrs["content_hash"] == new.attrs["content_hash"]
    same_grid = np.array_equal(old.tof.values, new.tof.values)
    sides = [(samples_of(dataset), campaign_of(dataset)) for dataset in (old, new)]
    names = dict.fromkeys(phase.name for _, campaign in sides for phase in campaign.phases)
    parts = {name: (_part(*sides[0], name), _part(*sides[1], name)) for name in names}
    pairs = {name: _same_cells(*both) for name, both in parts.items()}
    differences = {}
    if same_grid and not identical:
        counts = {name: len(pairs[name]) for name in names}
        differences = {
            name: _largest_differences(old, new, pairs[name][chosen])
            for name, chosen in _chosen(counts, max_compared).items()
        }
    together = np.concatenate([np.empty(0), *differences.values()])
    before, after = _facts(old, sides[0][1]), _facts(new, sides[1][1])
    digests = [{row.tobytes() for row in dataset.block_sha256.values} for dataset in (old, new)]
    return Changes(
        identical=identical,
        definition=tuple(
            Difference(what, before.get(what), after.get(what))
            for what in before | after
            if before.get(what) != after.get(what)
        ),
        phases=tuple(
            _phase_change(name, *parts[name], len(pairs[name]), differences.get(name))
            for name in names
        ),
        same_grid=same_grid,
        blocks=len(digests[1]),
        same_blocks=len(digests[0] & digests[1]),
        intensities=_comparison(sum(map(len, pairs.values())), together) if differences else None,
    )


@dataclass(frozen=True)
class _Part:
    """The samples of one phase in one data set."""

    rows: Indices  # (n,)
    cells: Array  # (n, 6), in Å and degrees
    crystal_system: str = ""
    free_parameters: tuple[str, ...] = ()


def _part(samples: Samples, campaign: Campaign, name: str) -> _Part:
    # By name: in another campaign the same phase may have another code.
    for code, phase in enumerate(campaign.phases):
        if phase.name == name:
            rows, lattice = np.flatnonzero(samples.phase == code), phase.lattice
            system, free = lattice.crystal_system.name, lattice.free_parameters
            return _Part(rows, samples.cells[rows], system, free)
    return _Part(np.empty(0, np.intp), np.empty((0, 6)))


def _same_cells(old: _Part, new: _Part) -> Indices:
    """Pair the samples whose cells are the same: rows (n_pairs, 2) in old and new, old ascending.

    Rounding would be simpler, but it parts neighbours on either side of a rounding boundary; the
    logarithms of two values differ by their relative difference, wherever they are.
    """
    if not len(old.rows) or not len(new.rows):
        return np.empty((0, 2), np.intp)
    # Here alone, because it takes a while to import.
    from scipy.spatial import KDTree

    distance, partner = KDTree(np.log(new.cells)).query(
        np.log(old.cells), p=np.inf, distance_upper_bound=SAME_CELL
    )
    distance, partner = np.asarray(distance), np.asarray(partner)
    paired = np.flatnonzero(np.isfinite(distance))
    # A tag has no cell twice, but two that are almost the same may have the same partner.
    _, first = np.unique(partner[paired], return_index=True)
    paired = paired[np.sort(first)]
    return np.column_stack([old.rows[paired], new.rows[partner[paired]]])


def _phase_change(
    name: str, old: _Part, new: _Part, both: int, differences: Array | None
) -> PhaseChange:
    systems = dict.fromkeys(part.crystal_system for part in (old, new) if part.crystal_system)
    before, after = (free_ranges(part.cells, part.free_parameters) for part in (old, new))
    counts = both, len(old.rows) - both, len(new.rows) - both
    intensities = None if differences is None else _comparison(both, differences)
    return PhaseChange(name, " or ".join(systems), *counts, before, after, intensities)


def _chosen(common: Mapping[str, int], max_compared: int) -> dict[str, Indices]:
    """Choose evenly which common samples of each phase to compare.

    Each phase that has some gets an equal part; what one cannot fill is left to the larger ones.
    """
    chosen = {}
    left = max_compared
    counts = sorted((count, name) for name, count in common.items() if count)
    for position, (count, name) in enumerate(counts):
        part = min(count, left // (len(counts) - position))
        chosen[name] = np.linspace(0, count - 1, part).astype(np.intp)
        left -= part
    return chosen


def _largest_differences(old: xr.Dataset, new: xr.Dataset, pairs: Indices) -> Array:
    """Return the largest difference of each pair of patterns, rows (n, 2), over their maximum."""
    before = old.intensity[pairs[:, 0]].values.astype(np.float64)
    after = new.intensity[pairs[:, 1]].values.astype(np.float64)
    largest = np.maximum(np.abs(before).max(axis=1), np.abs(after).max(axis=1))
    difference = np.abs(after - before).max(axis=1)
    # Two patterns of nothing but zeros do not differ.
    return np.asarray(difference / np.where(largest > 0, largest, 1.0))


def _comparison(common: int, differences: Array) -> Comparison:
    differing = int((differences > SAME_INTENSITY).sum())
    return Comparison(common, len(differences), differing, float(differences.max()))


def _facts(dataset: xr.Dataset, campaign: Campaign) -> dict[str, str]:
    """Return what defines a data set and where it comes from, as short texts by their subject."""
    attrs, definition = dataset.attrs, campaign.definition
    tof, broadening = definition["tof"], definition["broadening"]
    facts = {
        "campaign": campaign.name,
        "campaign file": attrs["campaign_sha256"][:_SHORT],
        "samples": f"{dataset.sizes['sample']:,}",
        "sampling": definition["sampling"],
        "seed": str(definition["seed"]),
        "instrument": f"bank {campaign.instrument.bank}, {campaign.instrument.sha256[:_SHORT]}",
        "grid": f"{tof['points']:,} points from {number_text(tof['start'])} µs, "
        f"ΔT/T = {number_text(tof['relative_step'])}",
        "broadening": f"size {number_text(broadening['size'])} µm, "
        f"microstrain {number_text(broadening['microstrain'])}e-6",
        "phases": ", ".join(phase.name for phase in campaign.phases),
    }
    for phase, config in zip(campaign.phases, definition["phases"], strict=True):
        of_phase = {
            "crystal system": phase.crystal_system.name,
            "space group": phase.space_group,
            "CIF": config["cif"]["sha256"][:_SHORT],
            **{
                f"{name} / {'Å' if name in 'abc' else '°'}": ranges_text(ranges)
                for name, ranges in config["cell"].items()
            },
            "excluded": ", ".join(config["exclude"]) or "nothing",
            "cells drawn": "all of the grid"
            if config["samples"] is None
            else f"{config['samples']:,}",
        }
        facts |= {f"{phase.name}: {what}": fact for what, fact in of_phase.items()}
    facts |= {"simulator": attrs["simulator"], "simulator version": attrs["simulator_version"]}
    if "call_path" in attrs:
        facts["call path"] = attrs["call_path"]
    return facts | {
        "code commit": attrs["code_commit"],
        "rows per chunk": f"{attrs['rows_per_chunk']:,}",
        "schema version": str(attrs["schema_version"]),
    }
