"""Data checks: what has to be true of a data set before anybody learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandera.xarray as pa
import xarray as xr
from numpy.typing import NDArray
from pandera.errors import SchemaErrors

from bragg_data.campaign import Campaign, Samples
from bragg_data.crystallography.cell import CELL_PARAMETERS, d_spacing
from bragg_data.crystallography.reflections import unique_reflections
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.preprocessing import sqrt_unit
from bragg_data.splits import Part, blocked_split, random_split
from bragg_data.store import schema
from bragg_data.store.schema import SchemaError, campaign_of, samples_of

_PEAKS = 6  # of one profile that are looked at, those of the longest d
_STRONG, _WEAK = 0.15, 0.05  # shares of the strongest: what is looked at, and what may be near it
_NEAR, _APART = 12.0, 30.0  # points in which a peak is looked for, and to the next strong one
_COMPONENTS = 64
_OUTSIDE = 0.05  # share of measured profiles that may be further from the data than its own 99 %


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    name
        Of the check.
    hard
        Whether a data set that fails it must not be tagged.
    passed
        Whether all is well.
    message
        One sentence.
    """

    name: str
    hard: bool
    passed: bool
    message: str


def label_schema(dataset: xr.Dataset, campaign: Campaign) -> pa.DatasetSchema:
    """Return the schema of a data set's labels: dtypes, dimensions, units, physical ranges."""
    allowed = {
        **{name: pa.Check.in_range(0.1, 1000.0) for name in CELL_PARAMETERS[:3]},
        **{name: pa.Check.in_range(1.0, 179.0) for name in CELL_PARAMETERS[3:]},
        "phase": pa.Check.in_range(0, len(campaign.phases) - 1),
        "crystal_system": pa.Check.isin([int(p.crystal_system) for p in campaign.phases]),
        "status": pa.Check.isin([schema.DONE]),
    }
    sizes = {"sample": dataset.sizes["sample"], "parameter": len(CELL_PARAMETERS)}
    variables = {**schema.LABELS, "status": schema.BOOKKEEPING["status"]}
    return pa.DatasetSchema(
        data_vars={
            name: pa.DataArraySchema(
                dtype=spec.dtype,
                dims=spec.dims,
                sizes={dim: sizes[dim] for dim in spec.dims},
                attrs={k: v for k, v in spec.attrs.items() if k in ("units", "long_name")},
                checks=[allowed[name]] if name in allowed else [],
            )
            for name, spec in variables.items()
        }
    )


def check(
    dataset: xr.Dataset,
    *,
    peaks: int = 64,
    seed: int = 0,
    intensities: bool = True,
    on_chunk: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Check a data set.

    Parameters
    ----------
    dataset
        An opened snapshot, or one that is to be tagged.
    peaks
        So many profiles, drawn at random, are compared with their labels.
    seed
        Of the draw, and of the splits whose leakage is looked at.
    intensities
        Whether all intensities are read (which takes seconds for a gigabyte).
    on_chunk
        Called with the number of profiles of every chunk that is read.
    """
    try:
        schema.validate(dataset)
    except SchemaError as error:
        return [Finding("schema", True, False, str(error))]
    campaign, samples = campaign_of(dataset), samples_of(dataset)
    found = [Finding("schema", True, True, f"layout, hashes and attributes of version "
                     f"{schema.SCHEMA_VERSION}")]  # fmt: skip
    found.append(_labels(dataset, campaign))
    found.append(_ranges(samples, campaign))
    found.append(_counts(samples, campaign))
    found.append(_duplicates(samples))
    if intensities:
        found.append(_intensities(dataset, on_chunk))
    found.append(_peaks(dataset, samples, campaign, peaks, seed))
    found += list(_leakage(samples, seed))
    return found


def _labels(dataset: xr.Dataset, campaign: Campaign) -> Finding:
    labels = dataset[[*schema.LABELS, "status"]].load()
    try:
        label_schema(dataset, campaign).validate(labels, lazy=True)
    except SchemaErrors as errors:
        first = errors.schema_errors[0]
        more = f" and {len(errors.schema_errors) - 1} more" if errors.schema_errors[1:] else ""
        return Finding("labels", True, False, " ".join(str(first).split())[:300] + more)
    return Finding("labels", True, True, f"{len(labels)} variables: dtypes, units, ranges")


def _ranges(samples: Samples, campaign: Campaign) -> Finding:
    """Compare the cells' extremes with what the campaign draws."""
    wanted = campaign.samples
    for code, phase in enumerate(campaign.phases):
        own, drawn = samples.cells[samples.phase == code], wanted.cells[wanted.phase == code]
        if len(own) and ((own.min(0) < drawn.min(0)) | (own.max(0) > drawn.max(0))).any():
            return Finding("ranges", True, False, f"Cells of {phase.name} leave its ranges.")
    return Finding("ranges", True, True, "all cells are within the campaign's ranges")


def _counts(samples: Samples, campaign: Campaign) -> Finding:
    wanted = np.bincount(campaign.samples.phase[: len(samples)], minlength=len(campaign.phases))
    counts = np.bincount(samples.phase, minlength=len(campaign.phases))
    told = ", ".join(
        f"{count:,} {phase.name}" for count, phase in zip(counts, campaign.phases, strict=True)
    )
    if not np.array_equal(counts, wanted):
        return Finding("counts", True, False, f"{told}; the campaign has {wanted.tolist()}.")
    return Finding("counts", True, bool((counts > 0).all() or len(samples) < 1000), told)


def _duplicates(samples: Samples) -> Finding:
    keys = np.column_stack([samples.phase, np.round(samples.cells, 9)])
    double = len(keys) - len(np.unique(keys, axis=0))
    found = f"{double:,} cells come twice" if double else "no cell comes twice"
    return Finding("duplicates", True, double == 0, found)


def _intensities(dataset: xr.Dataset, on_chunk: Callable[[int], None] | None) -> Finding:
    wrong = negative = flat = 0
    for part in _chunks(dataset):
        finite = np.isfinite(part).all(axis=1)
        wrong += int((~finite).sum())
        negative += int((part[finite] < 0).any(axis=1).sum())
        flat += int((np.ptp(part[finite], axis=1) == 0).sum())
        if on_chunk is not None:
            on_chunk(len(part))
    problems = [
        f"{count:,} {what}"
        for count, what in ((wrong, "not finite"), (negative, "negative"), (flat, "constant"))
        if count
    ]
    n = dataset.sizes["sample"]
    found = f"of {n:,} profiles {', '.join(problems)}" if problems else f"all {n:,} profiles finite"
    return Finding("intensities", True, not problems, found)


def _chunks(dataset: xr.Dataset) -> Iterator[NDArray[np.float32]]:
    rows = int(dataset.attrs["rows_per_chunk"])
    for start in range(0, dataset.sizes["sample"], rows):
        yield dataset.intensity[start : start + rows].values


def _peaks(
    dataset: xr.Dataset, samples: Samples, campaign: Campaign, count: int, seed: int
) -> Finding:
    """Look whether the first peaks stand where the label's cell puts them, by Bragg's law."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    # Rows of few chunks: each one that is touched is decompressed whole.
    rows_per_chunk = int(dataset.attrs["rows_per_chunk"])
    chunks = -(-len(samples) // rows_per_chunk)
    looked = wrong = 0
    worst = 0.0
    for chunk in generator.permutation(chunks)[: min(4, chunks)]:
        start = int(chunk) * rows_per_chunk
        part = dataset.intensity[start : start + rows_per_chunk].values
        for row in generator.permutation(len(part))[: -(-count // min(4, chunks))]:
            label = samples[np.array([start + int(row)])]
            misses = peak_misses(part[row], label, campaign)
            looked += len(misses)
            wrong += int((misses > 1).any())
            worst = max(worst, float(misses.max(initial=0.0)))
    if not looked:
        return Finding("peaks", False, True, "no peak stands alone: nothing to look at")
    found = f"{looked:,} peaks of {count} profiles, the worst off by {worst:.0%} of what may be"
    if wrong:
        found = f"{wrong} of {count} profiles have peaks where their cell puts none; {found}"
    return Finding("peaks", True, not wrong, found)


def peak_misses(
    profile: NDArray[np.floating], label: Samples, campaign: Campaign
) -> NDArray[np.float64]:
    """Return how far the first peaks are from where a cell puts them, over what may be.

    Lines that stand alone and are strong enough are looked for within their neighbourhood; the
    highest point may be off by half a width, the constants of the rise and the decay, and two
    points of the grid.

    Parameters
    ----------
    profile : shape (points,)
        Without background.
    label
        One sample.
    campaign
        Phases, instrument and grid.

    Returns
    -------
    shape (n,)
        For each peak that was looked at, those of the longest d first; 1 is just tolerated.
    """
    instrument, grid = campaign.instrument, campaign.grid
    phase = campaign.phases[int(label.phase[0])]
    longest = float(instrument.d_spacing_from_tof(np.array([grid.stop]))[0])
    shortest = float(instrument.d_spacing_from_tof(np.array([grid.start]))[0])
    shortest = max(shortest, longest / 3)  # beyond, peaks overlap
    h, k, l = (max(1, int(length / shortest) + 1) for length in label.cells[0, :3])  # noqa: E741
    reflections = unique_reflections(phase, (h, k, l))
    d = d_spacing(reflections.hkl, label.cells)[0]
    area = reflections.multiplicity * reflections.f_squared(d) * d**4
    position = np.log(instrument.tof_from_d_spacing(d) / grid.start) / grid.relative_step
    inside = (position > _NEAR) & (position < grid.points - _NEAR - 1)
    if not inside.any():
        return np.empty(0)
    area = area / area[inside].max()
    misses = []
    strong = np.flatnonzero(inside & (area > _STRONG))
    for line in strong[np.argsort(-d[strong])]:
        near = np.abs(position - position[line])
        same = near < 1e-3
        disturbing = (near < _NEAR) & (area > _WEAK * area[line])
        disturbing |= (near < _APART) & (area > area[line] / 2)
        if (disturbing & ~same).any():
            continue
        shape = peak_shape(
            instrument, d[line : line + 1], size=campaign.size, microstrain=campaign.microstrain
        )
        width = float(mixing(shape.variance, shape.fwhm)[0][0])
        tof = grid.start * np.exp(grid.relative_step * position[line])
        tolerated = (width / 2 + 1 / shape.rise[0] + 1 / shape.decay[0]) / (
            tof * grid.relative_step
        ) + 2
        low, high = (round(position[line] + sign * _NEAR) for sign in (-1, 1))
        apex = low + int(np.argmax(profile[low : high + 1]))
        misses.append(abs(apex - position[line]) / tolerated)
        if len(misses) == _PEAKS:
            break
    return np.array(misses)


def _leakage(samples: Samples, seed: int) -> Iterator[Finding]:
    """Look for cells on both sides of the splits."""
    keys = np.column_stack([samples.phase, np.round(samples.cells, 9)])
    parts = {
        "random": random_split(samples.crystal_system, seed=seed),
        "blocked": blocked_split(samples.crystal_system, samples.cells, seed=seed),
    }
    for name, part in parts.items():
        training = {row.tobytes() for row in keys[part != Part.test]}
        both = sum(row.tobytes() in training for row in keys[part == Part.test])
        found = f"{both:,} test cells are learnt from" if both else "no test cell is learnt from"
        yield Finding(f"leakage, {name} split", True, not both, found)


# ---- drift -------------------------------------------------------------------------------------


def drift(dataset: xr.Dataset, measured: NDArray[np.floating], *, seed: int = 0) -> Finding:
    r"""Tell how far measured profiles are from a data set: whether it may answer for them.

    Square-rooted profiles of unit norm are compared with the span of the data's principal
    components; what is left over is a distance. Of the data's own profiles 99 % are nearer than
    some distance; measured ones that are further off look like nothing that is stored.

    Parameters
    ----------
    dataset
        An opened snapshot.
    measured : shape (m, points)
        On the data set's grid, prepared as for a model.
    seed
        Of the chunks that the components are found from.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, 8]))
    rows = int(dataset.attrs["rows_per_chunk"])
    chunks = generator.permutation(-(-dataset.sizes["sample"] // rows))[:4]
    own = np.concatenate([dataset.intensity[c * rows : (c + 1) * rows].values for c in chunks])
    own = np.asarray(sqrt_unit(own), dtype=np.float64)
    half = len(own) // 2
    components = min(_COMPONENTS, half)
    directions = np.linalg.svd(own[:half], full_matrices=False)[2][:components]

    def left(profiles: NDArray[np.float64]) -> NDArray[np.float64]:
        rest = profiles - profiles @ directions.T @ directions
        return np.asarray(np.linalg.norm(rest, axis=1))

    limit = float(np.quantile(left(own[half:]), 0.99))
    distances = left(np.asarray(sqrt_unit(measured), dtype=np.float64))
    outside = float((distances > limit).mean())
    found = (
        f"{outside:.0%} of {len(measured)} measured profiles are further from the data than 99 % "
        f"of its own (median distance {np.median(distances):.2f}, the data's 99 %: {limit:.2f})"
    )
    return Finding("drift", False, outside <= _OUTSIDE, found)
