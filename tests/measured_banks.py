"""Measured banks of known samples, from patterns evaluated peak by peak or by the simulator."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bragg_data.crystallography.structure import Phase, phase_from_cif
from bragg_data.instrument.instprm import Instrument, TofGrid, read_instruments
from bragg_data.measurement.readers import Profile
from bragg_data.refinement.measured_bank import MeasuredBank, measured_bank
from bragg_data.simulation.kinematic import Simulator

STRUCTURES = Path(__file__).parent / "data" / "structures"


def structure(name: str) -> Phase:
    """Return a published structure of the tests' data."""
    return phase_from_cif((STRUCTURES / f"{name}.cif").read_text(encoding="utf-8"), name)


def nomad() -> Instrument:
    """Return bank 4 of NOMAD."""
    (instrument,) = read_instruments(
        Path(__file__).parents[1] / "bragg_data" / "campaigns" / "nomad_bank4.instprm"
    )
    return instrument


def bins(first: float, last: float, step: float) -> np.ndarray:
    """Return centres of logarithmic bins in µs."""
    return np.asarray(first * np.exp(step * np.arange(int(np.log(last / first) / step))))


def profile(
    tof: np.ndarray, peaks: np.ndarray, *, counts: float, seed: int, bank: int = 1
) -> Profile:
    """Return a profile of counts, up to ``counts`` over a sloping background."""
    x = np.linspace(-1, 1, len(tof))
    expected = counts * peaks / peaks.max() + 0.06 * counts * (1 + 0.3 * x - 0.2 * x**2)
    y = np.random.default_rng(seed).poisson(expected).astype(np.float64)
    return Profile(tof, y, np.sqrt(np.maximum(y, 1)), bank=bank)


def bank_of(
    samples: Sequence[tuple[Phase, Sequence[float], Mapping[str, float]]],
    instrument: Instrument,
    tof: np.ndarray,
    *,
    counts: float = 5000,
    seed: int = 0,
    true_difc: float = 0.0,
) -> MeasuredBank:
    """Return a bank that measured phases in cells (free parameters), each with its parameters.

    ``amount`` is the number of unit cells. ``true_difc`` is the relative error of the calibration
    that the bank is given.
    """
    grid = TofGrid(float(tof[0]) * 0.97, 3e-4, int(np.log(tof[-1] / tof[0] * 1.06) / 3e-4))
    truth = instrument.with_parameters(difc=instrument.difc * (1 + true_difc))
    total = np.zeros(grid.points)
    for phase, free, parameters in samples:
        simulator = Simulator([phase], truth, grid, 10.0, 300.0, width_range=(-0.2, 1.0))
        given = {name: value for name, value in parameters.items() if name != "amount"}
        cells = phase.lattice.cells(np.array([free]))
        (pattern,) = simulator.simulate(np.zeros(1, dtype=int), cells, **given)  # type: ignore[arg-type]
        total += parameters.get("amount", 1.0) * pattern
    peaks = np.interp(tof, grid.tof, total)
    measured = profile(tof, peaks, counts=counts, seed=seed, bank=instrument.bank)
    return measured_bank(measured, instrument)
