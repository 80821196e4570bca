"""Data checks: what has to be true of a data set before a model is trained on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandera.xarray as pa
import xarray as xr
from pandera.errors import SchemaErrors

from bragg_data.arrays import AnyFloats, Array
from bragg_data.campaign import Campaign, Samples
from bragg_data.crystallography.cell import CELL_PARAMETERS, d_spacing
from bragg_data.crystallography.reflections import unique_reflections
from bragg_data.instrument.peak_shape import mixing, peak_shape
from bragg_data.preprocessing import sqrt_unit
from bragg_data.splits import Part, blocked_split, random_split
from bragg_data.store import schema
from bragg_data.store.reading import StoreError, remedy_of, storage_errors
from bragg_data.store.schema import SchemaError, campaign_of, samples_of
from bragg_data.store.verification import check_block, rows_of

_PEAKS = 6  # of one profile that are checked, those of the longest d
_STRONG, _WEAK = 0.15, 0.05  # fractions of the strongest: what is checked, and what may be near it
_NEAR, _APART = 12.0, 30.0  # points in which a peak is searched for, and to the next strong one
_COMPONENTS = 64
_OUTSIDE = 0.05  # fraction of measured profiles that may be further from the data than its 99 %


@dataclass(frozen=True)
class Finding:
    """The result of one check; a data set that fails a ``hard`` one must not be tagged."""

    name: str
    hard: bool
    passed: bool
    message: str


def check(
    dataset: xr.Dataset,
    *,
    peaks: int = 64,
    intensities: bool = True,
    on_chunk: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Check a data set, opened from the store or about to be tagged.

    The peaks of some profiles, drawn at random, are compared with their labels. All ``intensities``
    are read (which takes seconds for a gigabyte), unless that is False; ``on_chunk`` is called with
    the number of profiles of every chunk that is read.
    """
    try:
        schema.validate(dataset)
    except SchemaError as error:
        return [Finding("schema", True, False, str(error))]
    campaign, samples = campaign_of(dataset), samples_of(dataset)
    version = f"layout, hashes and attributes of version {schema.SCHEMA_VERSION}"
    findings = [
        Finding("schema", True, True, version),
        _labels(dataset),
        _ranges(samples, campaign),
        _counts(samples, campaign),
        _duplicates(samples),
    ]
    if intensities:
        findings += _intensities(dataset, samples, on_chunk)
    try:
        with storage_errors("reading profiles", remedy_of(dataset.attrs)):
            findings.append(_peaks(dataset, samples, campaign, peaks))
    except StoreError as error:
        findings.append(Finding("peaks", True, False, str(error)))
    return [*findings, *_leakage(samples)]


def _labels(dataset: xr.Dataset) -> Finding:
    labels = dataset[list(CELL_PARAMETERS)].load()
    length, angle = pa.Check.in_range(0.1, 1000.0), pa.Check.in_range(1.0, 179.0)
    limits = zip(CELL_PARAMETERS, [length] * 3 + [angle] * 3, strict=True)
    columns = {name: pa.DataArraySchema(checks=[limit]) for name, limit in limits}
    try:
        pa.DatasetSchema(data_vars={**columns}).validate(labels, lazy=True)
    except SchemaErrors as errors:
        first = errors.schema_errors[0]
        more = f" and {len(errors.schema_errors) - 1} more" if errors.schema_errors[1:] else ""
        return Finding("labels", True, False, " ".join(str(first).split())[:300] + more)
    return Finding("labels", True, True, f"{len(labels)} cell parameters in their physical ranges")


def _ranges(samples: Samples, campaign: Campaign) -> Finding:
    """Compare the cells' extremes with what the campaign draws."""
    for code, phase in enumerate(campaign.phases):
        cells = samples.cells[samples.phase == code]
        drawn = campaign.samples.cells[campaign.samples.phase == code]
        if len(cells) and ((cells.min(0) < drawn.min(0)) | (cells.max(0) > drawn.max(0))).any():
            return Finding("ranges", True, False, f"Cells of {phase.name} leave its ranges.")
    return Finding("ranges", True, True, "all cells are within the campaign's ranges")


def _counts(samples: Samples, campaign: Campaign) -> Finding:
    expected = np.bincount(campaign.samples.phase[: len(samples)], minlength=len(campaign.phases))
    counts = np.bincount(samples.phase, minlength=len(campaign.phases))
    message = ", ".join(f"{n:,} {p.name}" for n, p in zip(counts, campaign.phases, strict=True))
    if not np.array_equal(counts, expected):
        message = f"{message}; the campaign has {expected.tolist()}."
        return Finding("counts", True, False, message)
    return Finding("counts", True, bool((counts > 0).all() or len(samples) < 1000), message)


def _duplicates(samples: Samples) -> Finding:
    keys = np.column_stack([samples.phase, np.round(samples.cells, 9)])
    double = len(keys) - len(np.unique(keys, axis=0))
    message = f"{double:,} cells come twice" if double else "no cell comes twice"
    return Finding("duplicates", True, double == 0, message)


def _intensities(
    dataset: xr.Dataset, samples: Samples, on_chunk: Callable[[int], None] | None
) -> Iterator[Finding]:
    """Read all profiles: whether they are what was written, and what profiles can be."""
    wrong = negative = flat = 0
    damaged: list[StoreError] = []
    n = dataset.sizes["sample"]
    for block in range(dataset.sizes["block"]):
        rows = rows_of(dataset, block)
        part = np.empty((0, 1))
        try:
            with storage_errors(f"reading block {block}", remedy_of(dataset.attrs)):
                part = dataset.intensity[rows].values
            check_block(dataset, samples, block, part)
        except StoreError as error:
            damaged.append(error)
        finite = np.isfinite(part).all(axis=1)
        wrong += int((~finite).sum())
        negative += int((part[finite] < 0).any(axis=1).sum())
        flat += int((np.ptp(part[finite], axis=1) == 0).sum())
        if on_chunk is not None:
            on_chunk(rows.stop - rows.start)
    message = str(damaged[0]) if damaged else "all blocks are what was written"
    yield Finding("hashes", True, not damaged, message)
    counts = (wrong, "not finite"), (negative, "negative"), (flat, "constant")
    problems = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    message = f"of {n:,} profiles {problems}" if problems else f"all {n:,} profiles finite"
    yield Finding("intensities", True, not problems, message)


def _peaks(dataset: xr.Dataset, samples: Samples, campaign: Campaign, count: int) -> Finding:
    """Check whether the first peaks are where the label's cell puts them, by Bragg's law."""
    generator = np.random.default_rng(np.random.SeedSequence([0, 7]))
    # Rows of few chunks, as chunks are decompressed whole.
    rows_per_chunk = int(dataset.attrs["rows_per_chunk"])
    chunks = -(-len(samples) // rows_per_chunk)
    checked = wrong = 0
    worst = 0.0
    for chunk in generator.permutation(chunks)[: min(4, chunks)]:
        start = int(chunk) * rows_per_chunk
        part = dataset.intensity[start : start + rows_per_chunk].values
        for row in generator.permutation(len(part))[: -(-count // min(4, chunks))]:
            label = samples[np.array([start + int(row)])]
            misses = peak_misses(part[row], label, campaign)
            checked += len(misses)
            wrong += int((misses > 1).any())
            worst = max(worst, float(misses.max(initial=0.0)))
    if not checked:
        return Finding("peaks", False, True, "no peak is isolated, so none was checked")
    message = f"{checked:,} peaks of {count} profiles, off by at most {worst:.0%} of the tolerance"
    if wrong:
        message = f"{wrong} of {count} profiles have peaks where their cell puts none; {message}"
    return Finding("peaks", True, not wrong, message)


def peak_misses(profile: AnyFloats, label: Samples, campaign: Campaign) -> Array:
    """Return how far the first peaks are from where one sample's cell puts them.

    Over the tolerance, for each peak that was checked, those of the longest d first. In a profile
    (points,) without background, isolated lines that are strong enough are searched for in their
    neighbourhood; the highest point may be off by half a width, the constants of the rise and the
    decay, and two points of the grid.
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


def _leakage(samples: Samples) -> Iterator[Finding]:
    keys = np.column_stack([samples.phase, np.round(samples.cells, 9)])
    parts = {
        "random": random_split(samples.crystal_system, seed=0),
        "blocked": blocked_split(samples.crystal_system, samples.cells, seed=0),
    }
    for name, part in parts.items():
        training = {row.tobytes() for row in keys[part != Part.test]}
        both = sum(row.tobytes() in training for row in keys[part == Part.test])
        message = f"{both:,} test cells are" if both else "no test cell is"
        yield Finding(
            f"leakage, {name} split", True, not both, f"{message} in the training data as well"
        )


def drift(dataset: xr.Dataset, measured: AnyFloats) -> Finding:
    r"""Return how far measured profiles are from a data set: whether it is made for them.

    Square-rooted profiles of unit norm are compared with the span of the data's principal
    components; what is left over is a distance. Of the data set's profiles 99 % are nearer than
    some distance; measured ones, (m, points) on the data set's grid and prepared as for a model,
    that are further off resemble nothing that is stored.
    """
    generator = np.random.default_rng(np.random.SeedSequence([0, 8]))
    rows = int(dataset.attrs["rows_per_chunk"])
    chunks = generator.permutation(-(-dataset.sizes["sample"] // rows))[:4]
    stored = np.concatenate([dataset.intensity[c * rows : (c + 1) * rows].values for c in chunks])
    stored = np.asarray(sqrt_unit(stored), dtype=np.float64)
    half = len(stored) // 2
    components = min(_COMPONENTS, half)
    directions = np.linalg.svd(stored[:half], full_matrices=False)[2][:components]

    def distance(profiles: Array) -> Array:
        rest = profiles - profiles @ directions.T @ directions
        return np.asarray(np.linalg.norm(rest, axis=1))

    limit = float(np.quantile(distance(stored[half:]), 0.99))
    distances = distance(np.asarray(sqrt_unit(measured), dtype=np.float64))
    outside = float((distances > limit).mean())
    message = (
        f"{outside:.0%} of {len(measured)} measured profiles are further from the data than 99 % "
        f"of the stored ones (median distance {np.median(distances):.2f}, 99 % of the stored ones: "
        f"{limit:.2f})"
    )
    return Finding("drift", False, outside <= _OUTSIDE, message)
