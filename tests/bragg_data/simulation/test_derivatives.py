"""Derivatives of patterns against differences of high order, in double precision."""

import numpy as np
import pytest

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.structure import Phase, phase_from_cif
from bragg_data.simulation.kinematic import Simulator

SAMPLE = {
    "u_scale": (1.1, 1e-3),  # value, step
    "size": (0.8, 1e-3),
    "microstrain": (1300.0, 1.0),
    "tzero": (-2.0, 0.01),
    "difc": (9500.0, 0.05),
    "width_scale": (1.02, 1e-3),
}
SHIFTS = (0.01, -0.02, 0.015)
CELLS = {"cubic": [4.01], "tetragonal": [3.99, 4.04], "trigonal": [4.0, 89.8]}


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


def simulator(campaign: Campaign, phases: tuple[Phase, ...] = ()) -> Simulator:
    """Return a simulator without GSAS-II's step, which has no derivative."""
    _, *setup = campaign.setup
    widths = (-0.4, 1.0)
    return Simulator(phases or campaign.phases, *setup, convention="textbook", width_range=widths)


def point(
    simulator: Simulator, code: int, free: list[float]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return the names of all parameters but the cell's, and values and steps with the cell's."""
    shifts = [f"shift_{k + 1}" for k in range(len(simulator.free_coordinates(code)))]
    values, steps = np.array(list(SAMPLE.values())).T
    of_cell = np.where(np.array(free) < 50, 1e-5, 1e-4)
    return (
        (*SAMPLE, *shifts),
        np.concatenate([free, values, SHIFTS[: len(shifts)]]),
        np.concatenate([of_cell, steps, np.full(len(shifts), 1e-3)]),
    )


def largest_error(simulator: Simulator, code: int, free: list[float]) -> float:
    """Return the largest error of any derivative, relative to its own maximum."""
    names, start, steps = point(simulator, code, free)
    count = len(free)

    def pattern(values: np.ndarray) -> np.ndarray:
        cell, parameters = values[:count], values[count:]
        (only,) = simulator.linearise(
            code, cell, names, parameters, slopes=False, precision=np.float64
        )
        return only

    _, *slopes = simulator.linearise(
        code, start[:count], names, start[count:], precision=np.float64
    )
    assert len(slopes) == len(start)
    errors = []
    for slope, step in zip(slopes, np.diag(steps), strict=True):
        # Sixth order: Fornberg, Math. Comp. 51 (1988) 699.
        weights = {1: 45, 2: -9, 3: 1}
        change = sum(
            w * (pattern(start + k * step) - pattern(start - k * step)) for k, w in weights.items()
        ) / (60 * step.sum())
        errors.append(np.abs(slope - change).max() / np.abs(change).max())
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("system", CELLS)
def test_derivatives_are_exact(campaign: Campaign, system: str) -> None:
    code = list(CELLS).index(system)
    assert largest_error(simulator(campaign), code, CELLS[system]) < 1e-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Scattering lengths of Gd")
def test_derivatives_with_resonances_are_exact(campaign: Campaign) -> None:
    """Scattering lengths of gadolinium change with the wavelength, so with the cell."""
    cif = (
        "data_gd\n_cell_length_a 5.3\n_cell_length_b 5.3\n_cell_length_c 5.3\n"
        "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\n"
        "_space_group_name_H-M_alt 'F m -3 m'\nloop_\n_atom_site_label\n_atom_site_type_symbol\n"
        "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n_atom_site_U_iso_or_equiv\n"
        "Gd1 Gd 0 0 0 0.006\nN1 N 0.5 0.5 0.5 0.009\n"
    )
    phases = (phase_from_cif(cif, "gadolinium nitride"),)
    # Tables of scattering lengths are piecewise linear: differences stay between their points.
    assert largest_error(simulator(campaign, phases), 0, [5.301]) < 1e-6


@pytest.mark.parametrize("system", CELLS)
def test_the_pattern_is_that_of_many_samples(campaign: Campaign, system: str) -> None:
    simulated, code = Simulator(*campaign.setup, width_range=(-0.4, 1.0)), list(CELLS).index(system)
    names, values, _ = point(simulated, code, CELLS[system])
    free, parameters = np.split(values, [len(CELLS[system])])
    given = dict(zip(SAMPLE, parameters, strict=False))
    shifts = parameters[len(SAMPLE) :][None] if len(names) > len(SAMPLE) else None
    cells = campaign.phases[code].lattice.cells(free[None])
    (expected,) = simulated.simulate(np.array([code]), cells, shifts=shifts, **given)
    (pattern,) = simulated.linearise(code, free, names, parameters, slopes=False)
    first, *_ = simulated.linearise(code, free, names, parameters)
    np.testing.assert_allclose(pattern, expected, rtol=0, atol=3e-6 * expected.max())
    np.testing.assert_allclose(first, expected, rtol=0, atol=3e-6 * expected.max())


def test_parameters_left_out_are_nominal(campaign: Campaign) -> None:
    simulated = simulator(campaign)
    free, names = np.array([4.01]), ("u_scale",)
    patterns = simulated.linearise(0, free, names, np.array([1.0]))
    assert patterns.shape == (3, campaign.grid.points)
    (expected,) = simulated.simulate(np.array([0]), np.array([[4.01] * 3 + [90.0] * 3]))
    np.testing.assert_allclose(patterns[0], expected, rtol=0, atol=5e-5 * expected.max())
