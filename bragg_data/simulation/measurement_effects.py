r"""Measurement effects: random differences between a simulated pattern and a measured profile.

A measured profile counts neutrons: with I the pattern of the sample, scaled to a maximum of 1,

.. math:: n_i \sim \text{Poisson}\big(N\, \phi_i\, (\epsilon_i (I_i + q J_i) + b_i)\big), \quad
          y_i = n_i / \phi_i

with N the counts at the highest peak, φ the incident spectrum, by which profiles are divided, ε
its error, b a smooth background, and J the pattern of an impurity. Each sample has its own
displacement parameters, coordinates, size and microstrain; unless it was calibrated again, the
calibration of the instrument has drifted. Training on such draws is known as domain randomisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Floats32
from bragg_data.campaign import Campaign
from bragg_data.campaign_file import MeasurementEffects
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.preprocessing import prepare_or_zero
from bragg_data.simulation.counting import TERMS, Measurements, count_neutrons
from bragg_data.simulation.kinematic import Simulator

_Array = NDArray[np.float64]
_GROUP = 16  # samples with the same displaced coordinates: new structure factors take a millisecond
_NEARLY_CUBIC = 0.3  # share of the cells


@dataclass(frozen=True, eq=False)
class Draws:
    """Simulated profiles with measurement effects."""

    intensity: _Array  # (n, points) on the campaign's grid, with background
    sigma: _Array  # (n, points)
    covered: NDArray[np.bool_]  # (n, points) where a profile holds information
    phase: NDArray[np.intp]  # (n,) true codes
    cells: _Array  # (n, 6) true ones

    def prepared(self) -> NDArray[np.float32]:
        """Return the input of models: background subtracted, between 0 and 1, (n, points).

        Profiles with nothing above their background are 0.
        """
        prepared = prepare_or_zero(self.intensity, self.sigma, self.covered)
        return np.asarray(prepared, dtype=np.float32)


def simulator_for(
    campaign: Campaign, phases: Sequence[Phase] | None = None, instrument: Instrument | None = None
) -> Simulator:
    """Return a simulator of a campaign, prepared for the range of widths that is drawn."""
    setup = phases or campaign.phases, instrument or campaign.instrument, *campaign.setup[2:]
    return Simulator(*setup, width_range=(-0.4, 1.0))


def draw_cells(campaign: Campaign, code: int, count: int, generator: np.random.Generator) -> _Array:
    """Draw cells (count, 6) of a phase, evenly over the campaign's range and often nearly cubic.

    A share of them is drawn near the cell with equal lengths and right angles, where the phases
    are hardest to distinguish; the nearest are arbitrarily close to it, if it is in the range.
    """
    lattice = campaign.phases[code].lattice
    index = lattice.free_columns
    known = campaign.samples.cells[campaign.samples.phase == code][:, index]
    low, high = known.min(axis=0), known.max(axis=0)
    free = generator.uniform(low, high, (count, len(index)))
    is_length = np.array([k < 3 for k in index])
    cubic = np.where(is_length, free[:, is_length].mean(axis=1, keepdims=True), 90.0)
    possible = ((cubic >= low) & (cubic <= high)).all(axis=1)
    near = (generator.random(count) < _NEARLY_CUBIC) & possible
    # At most 0.03 Å or 0.6 degrees off.
    reach = np.where(is_length, 0.03, 0.6) * generator.uniform(-1, 1, (count, len(index)))
    near_by = cubic + reach / 2
    # Beyond an end they are mirrored: cut off, lengths would come out equal.
    near_by = np.where(near_by > high, 2 * high - near_by, near_by)
    near_by = np.where(near_by < low, 2 * low - near_by, near_by)
    free = np.where(near[:, None], near_by, free)
    return np.asarray(lattice.cells(free))


def draw_labels(
    campaign: Campaign, per_phase: int, generator: np.random.Generator
) -> tuple[NDArray[np.intp], _Array]:
    """Draw ``per_phase`` cells of each phase; return phase codes (n,) and cells (n, 6)."""
    codes = range(len(campaign.phases))
    cells = [draw_cells(campaign, code, per_phase, generator) for code in codes]
    return np.repeat(np.arange(len(codes)), per_phase), np.concatenate(cells)


def draw_profiles(
    simulator: Simulator,
    phase: NDArray[np.integer],
    cells: _Array,
    generator: np.random.Generator,
    effects: MeasurementEffects | None = None,
    *,
    calibrated: bool = True,
) -> Draws:
    """Draw a profile with measurement effects for each phase code (n,) and cell (n, 6).

    The simulator is that of :func:`simulator_for`. ``calibrated``: the instrument was calibrated
    for this measurement, so that difC and Zero are right.
    """
    effects = effects or MeasurementEffects()
    count = len(phase)

    def even(ends: tuple[float, float]) -> _Array:
        return np.exp(generator.uniform(np.log(ends[0]), np.log(ends[1]), count))

    samples = {name: even(getattr(effects, name)) for name in ("u_scale", "size", "microstrain")}
    drift = generator.normal(0, 0.0 if calibrated else 1.0, (2, count))
    instrument = simulator.instrument
    samples["difc"] = instrument.difc * (1 + effects.difc * drift[0])
    samples["tzero"] = instrument.tzero + effects.tzero * drift[1]
    patterns = _patterns(simulator, phase, cells, samples, effects.shift, generator)
    tof, spectrum_error = simulator.grid.tof, effects.spectrum_error
    impure = generator.random(count) < effects.impurity_probability
    measured = Measurements(
        counts=even(effects.counts),
        impurity=np.where(impure, effects.impurity, 0.0) * generator.random(count),
        background=even(effects.background),
        background_terms=generator.normal(0, 0.5, (count, TERMS)) / np.arange(1, TERMS + 1),
        error_terms=generator.normal(0, spectrum_error, (count, TERMS)) / np.arange(1, TERMS + 1),
        summit=generator.uniform(0.3, 0.8, count),
        fall=generator.random(count) * np.log(effects.spectrum),
    )
    intensity, sigma = count_neutrons(patterns, tof, measured, generator)
    first, last = (tof[0] * (tof[-1] / tof[0]) ** share for share in effects.signal_end)
    end = generator.uniform(first, last, count)
    begin = tof[0] * (tof[-1] / tof[0]) ** (effects.signal_start * generator.random(count) ** 2)
    covered = (tof < end[:, None]) & (tof >= begin[:, None])
    intensity *= covered
    sigma *= covered
    return Draws(
        intensity=intensity,
        sigma=sigma,
        covered=covered,
        phase=np.asarray(phase, dtype=np.intp),
        cells=np.asarray(cells, dtype=np.float64),
    )


def _patterns(
    simulator: Simulator,
    phase: NDArray[np.integer],
    cells: _Array,
    samples: dict[str, _Array],
    shift: float,
    generator: np.random.Generator,
) -> Floats32:
    patterns = np.empty((len(phase), simulator.grid.points), dtype=np.float32)
    for code in np.unique(phase):
        rows = np.flatnonzero(phase == code)
        # Cells of a like shape share coordinates, and so the selection of their reflections.
        metric = simulator.phases[code].lattice.independent_metric(cells[rows])
        relative = metric / metric[:, :1]
        rows = rows[np.argsort(relative[:, np.ptp(relative, axis=0).argmax()], kind="stable")]
        modes = len(simulator.free_coordinates(int(code)))
        groups = -(-len(rows) // _GROUP)
        shifts = generator.normal(0, shift, (groups, modes)).repeat(_GROUP, axis=0)[: len(rows)]
        of_phase = {name: values[rows] for name, values in samples.items()}
        patterns[rows] = simulator.simulate(
            phase[rows], cells[rows], **of_phase, shifts=shifts if modes else None
        )
    return patterns
