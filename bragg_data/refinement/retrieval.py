r"""Which of many structures might explain what is left of measured banks.

The patterns of all structures are simulated once for each bank. A pattern P scaled to the best fit
of a residual r with weights w lowers χ² by
:math:`(\sum w r P)^2 / \sum w P^2`; as both sums are correlations on a logarithmic grid, fast
Fourier transforms give them for all cells that are a few per cent larger or smaller. Smooth parts
are taken out of both. Once more with everything blurred, that compares structures whose cells
have become longer in one direction than in another.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import gaussian_filter1d

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError
from bragg_data.crystallography.structure import Phase
from bragg_data.errors import first_line
from bragg_data.refinement.joint_model import simulator_of
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.time_limit import check_time
from bragg_data.simulation.kinematic import VERSION

_REACH = 0.03  # relative change of lengths that is searched
_SCALES = np.exp(np.linspace(-1, 1, 121) * np.log1p(_REACH))
_SMOOTH = 25.0  # σ in steps of the grid of what counts as background, 8 full widths of a peak
_MOST_FILES = 20  # of the cache
_BLURS = (0.0, 3.0, 9.0)  # σ in steps of the grid

_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    NotImplementedError,
    BadZipFile,
    zlib.error,
)

Complex = NDArray[np.complex64]


@dataclass(frozen=True, eq=False)
class PatternLibrary:
    """The patterns of many structures, in the cells of their CIFs, on the grids of some banks."""

    phases: tuple[Phase, ...]
    banks: tuple[NDArray[np.float32], ...]  # (n_phases, points of the grid), largest value 1
    grids: tuple[tuple[float, int], ...]  # of each bank: relative step and points

    @cached_property
    def _transforms(self) -> list[list[tuple[Complex, Complex]]]:
        """For each bank and blur the transforms of the patterns and of their squares."""
        of_banks = []
        for patterns, (step, points) in zip(self.banks, self.grids, strict=True):
            size = _size(step, points)
            of_blurs = []
            for blur in _BLURS:
                sharp = gaussian_filter1d(patterns, blur, axis=1) if blur else patterns
                lines = sharp - gaussian_filter1d(patterns, np.hypot(_SMOOTH, blur), axis=1)
                of_blurs.append((rfft(lines, size), rfft(lines**2, size)))
            of_banks.append(of_blurs)
        return of_banks

    def candidates(
        self, banks: Sequence[MeasuredBank], count: int, excluded: Collection[int] = ()
    ) -> list[tuple[int, float]]:
        """Return the structures that lower χ² the most, up to ``count`` of each blur.

        As their places among the phases, and factors on the lengths of their cells. ``banks`` hold
        the intensities that remain to be explained. Those at ``excluded`` places do not count.
        """
        if not self.phases:
            return []
        data = [_on_grid(bank) for bank in banks]
        chosen: dict[int, float] = {}
        for blur in range(len(_BLURS)):
            check_time()
            gains = np.zeros((len(self.phases), len(_SCALES)))
            for of_bank, (weights, values), (step, points) in zip(
                self._transforms, data, self.grids, strict=True
            ):
                gains += _gains(of_bank[blur], weights, values, step, points, _BLURS[blur])
            best = gains.argmax(axis=1)
            largest = gains.max(axis=1)
            largest[list(excluded)] = 0.0
            for place in np.argsort(-largest)[:count].tolist():
                if largest[place] > 0:
                    chosen.setdefault(place, float(_SCALES[best[place]]))
        return list(chosen.items())

    def similar(
        self, place: int, scale: float, banks: Sequence[MeasuredBank], least: float
    ) -> list[tuple[int, float]]:
        """Return structures with patterns like one's, which is the first of them.

        Blurred patterns correlate by at least ``least``, where that one's cell has ``scale`` as
        factor on its lengths, and the others have any within the range, which are returned, too.
        """
        gains = np.zeros((len(self.phases), len(_SCALES)))
        for of_bank, patterns, bank, (step, points) in zip(
            self._transforms, self.banks, banks, self.grids, strict=True
        ):
            weights, _ = _on_grid(bank)
            shift = np.log(scale) / step
            pattern = np.interp(np.arange(points) - shift, np.arange(points), patterns[place])
            gains += _gains(of_bank[1], weights, pattern, step, points, _BLURS[1])
        largest = gains.max(axis=1)
        chosen = np.flatnonzero(largest >= least**2 * largest[place])
        order = chosen[np.argsort(-largest[chosen])].tolist()
        order = [place, *(k for k in order if k != place)]
        return [(k, float(_SCALES[gains[k].argmax()])) for k in order]


def pattern_library(
    phases: Sequence[Phase],
    banks: Sequence[MeasuredBank],
    cache: Path | None = None,
    on_pattern: Callable[[], object] = lambda: None,
) -> tuple[PatternLibrary, list[str]]:
    """Return the patterns of structures on banks, and in sentences why some are left out.

    They are kept in the directory ``cache``, and simulated again where anything has changed.
    ``on_pattern`` is called for each structure and bank.
    """
    of_banks, failures = [], list[dict[str, str]]()
    for bank in banks:
        patterns, of_bank = _patterns(phases, bank, cache, on_pattern)
        of_banks.append(patterns)
        failures.append(of_bank)
    # A bank may be without any line of a structure.
    problems = {name: why for name, why in failures[0].items() if all(name in f for f in failures)}
    highest = np.max([patterns.max(axis=1, initial=0.0) for patterns in of_banks], axis=0)
    for phase, height in zip(phases, highest.tolist(), strict=True):
        if not height > 0:
            problems.setdefault(phase.name, "none of its lines is within the banks")
    used = [k for k, phase in enumerate(phases) if phase.name not in problems]
    grids = tuple((bank.grid.relative_step, bank.grid.points) for bank in banks)
    library = PatternLibrary(
        tuple(phases[k] for k in used), tuple(patterns[used] for patterns in of_banks), grids
    )
    return library, [f"{name} is left out: {why}" for name, why in problems.items()]


def _patterns(
    phases: Sequence[Phase],
    bank: MeasuredBank,
    cache: Path | None,
    on_pattern: Callable[[], object],
) -> tuple[NDArray[np.float32], dict[str, str]]:
    """Return the patterns on a bank, largest value 1, and why some phases have none, by name."""
    recipe = [VERSION, repr(bank.instrument), repr(bank.grid)]
    recipe += [repr((p.name, p.space_group, p.cell.tolist(), p.sites, p.cif)) for p in phases]
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:24]
    file = None if cache is None else cache / f"patterns-{digest}.npz"
    if file is not None:
        with suppress(*_DAMAGE), np.load(file) as known:
            names, reasons = known["names"].tolist(), known["reasons"].tolist()
            if known["patterns"].shape == (len(phases), bank.grid.points):
                return known["patterns"], dict(zip(names, reasons, strict=True))
    patterns = np.zeros((len(phases), bank.grid.points), dtype=np.float32)
    problems: dict[str, str] = {}
    for k, phase in enumerate(phases):
        try:
            simulator = simulator_of(phase, bank.instrument, bank.grid)
            (pattern,) = simulator.simulate(np.zeros(1, dtype=int), np.array([phase.cell]))
            patterns[k] = pattern / max(float(pattern.max()), 1e-30)
        except CrystalError as error:
            problems[phase.name] = first_line(error)
        on_pattern()
    if file is not None:
        with suppress(OSError):  # a cache saves time alone
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            try:
                with temporary.open("wb") as stream:
                    reasons = np.array(list(problems.values()), dtype=np.str_)
                    names = np.array(list(problems), dtype=np.str_)
                    np.savez(stream, patterns=patterns, names=names, reasons=reasons)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
            _tidy(file.parent)
    return patterns, problems


def _tidy(cache: Path) -> None:
    """Leave the libraries that were made last."""
    files = sorted(cache.glob("patterns-*.npz"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


def _size(step: float, points: int) -> int:
    return int(next_fast_len(points + 2 * int(np.ceil(np.log1p(_REACH) / step)), real=True))


def _on_grid(bank: MeasuredBank) -> tuple[Array, Array]:
    """Return weights and weighted means of intensities over the steps of a bank's grid."""
    grid = bank.grid
    place = np.rint(np.log(bank.tof / grid.start) / grid.relative_step).astype(int)
    weights = np.asarray(np.bincount(place, 1 / bank.sigma**2, grid.points), dtype=np.float64)
    sums = np.bincount(place, bank.intensity / bank.sigma**2, grid.points)
    return weights, sums / np.maximum(weights, 1e-300)


def _gains(
    transforms: tuple[Complex, Complex],
    weights: Array,
    values: Array,
    step: float,
    points: int,
    blur: float,
) -> Array:
    """Return the decrease of χ² by each pattern at each scale of its cell, (n, n_scales)."""
    covered = gaussian_filter1d(weights, _SMOOTH) + 1e-300
    lines = values - gaussian_filter1d(weights * values, _SMOOTH) / covered
    if blur:
        around = gaussian_filter1d(weights, blur) + 1e-300
        lines = gaussian_filter1d(weights * lines, blur) / around
        weights = np.where(weights > 0, around, 0.0)
    size = _size(step, points)
    above = irfft(np.conj(transforms[0]) * rfft(weights * lines, size), size)
    below = irfft(np.conj(transforms[1]) * rfft(weights, size), size)
    shifts = np.rint(np.log(_SCALES) / step).astype(int) % size
    least = 1e-6 * below.max(axis=1, keepdims=True, initial=1e-300)
    return np.asarray(np.maximum(above, 0)[:, shifts] ** 2 / np.maximum(below, least)[:, shifts])
