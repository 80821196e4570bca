"""Tables of reflections and peak shapes of a campaign, for the pattern layer."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, reciprocal_metric
from bragg_data.crystallography.reflections import Lines, unique_lines
from bragg_data.crystallography.scattering import ResonanceError
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument import peak_shape as peaks
from bragg_models.networks.guided_config import PatternConfig, PatternPhase
from bragg_models.targets import Targets

# Of a phase with n_lines reflections. products (n_terms, n_lines): products of Miller indices that
# multiply the terms of the reciprocal metric. strengths (n_pairs, n_lines): multiplicity times the
# part of the squared structure factor that each pair of displacement parameters damps. rates
# (n_pairs,): 2π² times the sum of the pair's displacement parameters, in Å².
PHASE_TABLES = ("products", "strengths", "rates")

MARGIN = 4  # grid nodes beyond the window over which the B-spline of a reflection may extend

_Array = NDArray[np.float64]

_SHORTEST = 0.42  # Å: at shorter spacings peaks of most structures overlap beyond use
_MOST_LINES = 80  # reflections of one cell; more would not determine it any better
_FEWEST = 256  # least number of points that are compared
_LEAD = 64  # points before the compared ones on which reflections may lie: their tails reach in
_SKEW_STATIONS, _SKEW_LEVELS = 9, 8  # positions and microstrains at which peaks are compared
_CLEAR = 1e-2  # of the root of the highest point: below, slopes of a peak's root say nothing
_STATION_SPACING = 16  # points between the positions at which the peak shape is computed


def pattern_tables(
    campaign: Campaign, targets: Targets, *, skewed: bool = False
) -> tuple[PatternConfig, Mapping[str, _Array]]:
    """Return the configuration of a campaign's pattern layer, and its tables by name.

    The compared points begin where the cell with the most reflections has 80 of them in the rest
    of the window, or at 0.42 Å. The tables are those of :data:`PHASE_TABLES`, with the code of the
    phase as a suffix, and ``shapes`` and ``shares`` of the peaks.
    """
    instrument, grid, samples = campaign.instrument, campaign.grid, campaign.samples
    cells_of = [_extremes(samples.cells[samples.phase == k]) for k in range(len(targets.names))]
    longest = float(instrument.d_spacing_from_tof(np.array([grid.stop]))[0])
    shortest = max(
        _shortest_spacing(phase, cells, longest)
        for phase, cells in zip(campaign.phases, cells_of, strict=True)
    )
    position = np.log(instrument.tof_from_d_spacing(shortest) / grid.start) / grid.relative_step
    first = int(np.clip(position, 0, max(grid.points - _FEWEST, 0)))
    base = max(first - _LEAD, 0)
    d_min = float(_d_spacing_at(campaign, np.array([base]))[0])
    phases: list[PatternPhase] = []
    tables: dict[str, _Array] = {}
    for code, (phase, cells) in enumerate(zip(campaign.phases, cells_of, strict=True)):
        pattern_phase, of_phase = _phase_tables(phase, cells, d_min, targets)
        phases.append(pattern_phase)
        tables |= {f"{n}_{code}": t for n, t in zip(PHASE_TABLES, of_phase, strict=True)}
    tables["shapes"], tables["shares"] = _basis_shapes(campaign, base)
    config = PatternConfig(
        points=grid.points,
        relative_step=grid.relative_step,
        start=grid.start,
        calibration=(instrument.difc, instrument.difa, instrument.difb, instrument.tzero),
        phases=tuple(phases),
        first=first,
        base=base,
        skew=lorentzian_skew(campaign, base) if skewed else PatternConfig.skew,
    )
    return config, tables


def _d_spacing_at(campaign: Campaign, position: _Array) -> _Array:
    grid = campaign.grid
    tof = grid.start * np.exp(grid.relative_step * position)
    return np.asarray(campaign.instrument.d_spacing_from_tof(tof))


def _extremes(cells: _Array) -> _Array:
    """Return a part of some cells that covers their range."""
    chosen = [cells[:: max(len(cells) // 2000, 1)]]
    chosen += [cells[[column.argmin(), column.argmax()]] for column in cells.T]
    return np.concatenate(chosen)


def _lines_above(phase: Phase, cells: _Array, d_min: float) -> tuple[Lines, _Array]:
    """Return reflections that some cells have above a d-spacing, and 1/d² of each in each cell."""
    h, k, l = (int(np.floor(length / d_min)) for length in cells[:, :3].max(axis=0))  # noqa: E741
    lines = unique_lines(phase, (h, k, l))
    terms = [group[0] for group in phase.lattice.metric_terms]
    inverse = reciprocal_metric(cells)[:, terms] @ np.asarray(lines.products, dtype=np.float64)
    return lines, inverse


def _shortest_spacing(phase: Phase, cells: _Array, longest: float) -> float:
    """Return the spacing, in Å, above which no cell has more than the largest number of lines.

    ``longest`` is the spacing at the window's end.
    """
    volumes = np.prod(cells[:, :3], axis=1)
    few = np.unique(np.concatenate([np.argsort(volumes)[-200:], np.arange(0, len(cells), 20)]))
    sufficient = longest / 1.5
    for shortest in np.geomspace(sufficient, _SHORTEST, 16):
        _, inverse = _lines_above(phase, cells[few], shortest)
        inside = (inverse < shortest**-2) & (inverse > longest**-2)
        if inside.sum(axis=1).max() > _MOST_LINES:
            break
        sufficient = shortest
    return float(sufficient)


def _phase_tables(
    phase: Phase, cells: _Array, d_min: float, targets: Targets
) -> tuple[PatternPhase, tuple[_Array, _Array, _Array]]:
    lines, inverse = _lines_above(phase, cells, d_min)
    if lines.reflections.resonances:
        elements = {resonance.symbol for resonance in lines.reflections.resonances}
        raise ResonanceError(
            f"Phase '{phase.name}' holds {', '.join(sorted(elements))}, of which the scattering "
            f"length varies with wavelength: networks with a pattern layer do not model that. "
            f"Train another model, for example --model paper."
        )
    # A margin for cells a little outside the range.
    inside = inverse < d_min**-2 * 1.02
    ever = inside.any(axis=0)
    u = lines.u_groups
    pairs = [u[i] + u[j] for i in range(len(u)) for j in range(i, len(u))]
    products = np.asarray(lines.products, dtype=np.float64)[:, ever]
    strengths = np.asarray(lines.strengths, dtype=np.float64)[:, ever]
    names, tied = targets.parameters, dict(phase.lattice.tied)
    sources = [tied.get(name, name) for name in CELL_PARAMETERS]
    pattern_phase = PatternPhase(
        free=tuple(names.index(name) for name in phase.lattice.free_parameters),
        cell=tuple(float(names.index(s)) if isinstance(s, str) else -float(s) for s in sources),
        terms=tuple(group[0] for group in phase.lattice.metric_terms),
        lines=products.shape[1],
        pairs=len(pairs),
        most=int(1.1 * inside.sum(axis=1).max()) + 4,
    )
    return pattern_phase, (products, strengths, 2 * np.pi**2 * np.array(pairs))


def _basis_shapes(campaign: Campaign, base: int) -> tuple[_Array, _Array]:
    """Return basis shapes (rank, 2·reach + 1) of all peaks, and their shares, (nodes, rank).

    Along the window the peak shape changes so slowly that six basis shapes reproduce it to a few
    1e-5 of its maximum.
    """
    grid, rank = campaign.grid, PatternConfig.rank
    stop = grid.points + MARGIN
    stations = np.append(np.arange(base, stop - 1, _STATION_SPACING), stop - 1).astype(np.float64)
    profiles = _peaks(campaign, stations, campaign.microstrain)
    height = profiles.max(axis=1, keepdims=True)
    shapes = np.linalg.svd(profiles / height, full_matrices=False)[2][:rank]
    at_stations = profiles @ shapes.T
    nodes = np.arange(base, stop)
    shares = np.stack([np.interp(nodes, stations, share) for share in at_stations.T], axis=1)
    missing = rank - len(shapes)  # of a window so short that it has fewer stations
    return np.pad(shapes, ((0, missing), (0, 0))), np.pad(shares, ((0, 0), (0, missing)))


def _peaks(campaign: Campaign, stations: _Array, microstrain: float) -> _Array:
    """Return the peaks at some points of the grid, shape (n_stations, 2·reach + 1)."""
    grid, reach = campaign.grid, PatternConfig.reach
    offsets = np.arange(-reach, reach + 1)
    tof = grid.start * np.exp(grid.relative_step * stations)[:, None]
    offset = grid.start * np.exp(grid.relative_step * (stations[:, None] + offsets)) - tof
    d = _d_spacing_at(campaign, stations)
    shape = peaks.peak_shape(campaign.instrument, d, size=campaign.size, microstrain=microstrain)
    width, eta = (v[:, None] for v in peaks.mixing(shape.variance, shape.fwhm))
    gauss, lorentz = peaks.parts(offset, shape.columns(), width, "gsas2", peaks.erfcx_blended)
    return np.asarray((1 - eta) * gauss + eta * lorentz)


def lorentzian_skew(campaign: Campaign, base: int) -> tuple[float, float, float]:
    """Return :attr:`PatternConfig.skew`, fitted to the peaks for the campaign's microstrains.

    GSAS-II's peak is not the convolution of one peak with Lorentzians of all widths: it shifts as
    it broadens, in LaB6 on POWGEN by 1e-4 of the cell between microstrains of 250e-6 and 3000e-6.
    """
    effects, step = campaign.measurement_effects, campaign.grid.relative_step
    stations = np.linspace(base + _LEAD, campaign.grid.points - 1, _SKEW_STATIONS)
    reference = np.fft.rfft(_peaks(campaign, stations, campaign.microstrain))
    frequency = np.fft.rfftfreq(2 * PatternConfig.reach + 1)
    unit = max(1e-6 * campaign.microstrain / step, 0.1)
    rows, shifts = [], []
    for microstrain in np.geomspace(*effects.microstrain, _SKEW_LEVELS):
        width = 1e-6 * (microstrain - campaign.microstrain) / step
        spectrum = reference * np.exp(-np.pi * frequency * width)
        expected = np.sqrt(_peaks(campaign, stations, microstrain).clip(min=0))
        shift = np.zeros((len(stations), 1))
        for _ in range(3):  # Gauss-Newton steps
            moved = spectrum * np.exp(-2j * np.pi * frequency * shift)
            model = np.sqrt(np.fft.irfft(moved, n=expected.shape[1]).clip(min=1e-12))
            slope = np.fft.irfft(-2j * np.pi * frequency * moved, n=expected.shape[1]) / (2 * model)
            slope *= model > _CLEAR * model.max(axis=1, keepdims=True)
            scale = (expected * model).sum(axis=1) / (model**2).sum(axis=1)
            rest = expected / scale[:, None] - model
            shift += ((rest * slope).sum(axis=1) / (slope**2).sum(axis=1))[:, None]
        g = np.log1p(width / unit) if width > -unit else np.log(1e-3)
        rows.append([g, g * g])
        shifts.append(np.median(shift))
    first, second = np.linalg.lstsq(np.array(rows), np.array(shifts), rcond=None)[0]
    return float(unit), float(first), float(second)
