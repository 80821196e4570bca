"""Free atomic coordinates: what symmetry allows, and that displaced atoms keep the space group."""

from dataclasses import replace

import numpy as np
import pytest

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.crystallography.structure import Phase, free_coordinates, phase_on_orthogonal_axes
from bragg_data.simulation.measurement_effects import simulator_for
from tests.exact_pattern import exact_patterns


def displaced(phase: Phase, modes: np.ndarray, shifts: np.ndarray) -> Phase:
    """The phase with its atoms displaced along its free coordinates, in Å of the CIF's cell."""
    return replace(phase, positions=phase.positions + np.tensordot(shifts, modes, axes=1))


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


# Published structures, and how many coordinates the literature refines in them.
@pytest.mark.parametrize(
    ("group", "cell", "atoms", "count"),
    [
        ("F d -3 m:2", (5.431, 5.431, 5.431), "Si1 Si 0.125 0.125 0.125 0.006", 0),
        ("P 42/m n m", (4.593, 4.593, 2.959), "Ti1 Ti 0 0 0 0.005\nO1 O 0.3048 0.3048 0 0.005", 1),
        (
            "I 4/m c m",
            (5.512, 5.512, 7.805),
            "Sr1 Sr 0 0.5 0.25 0.003\nTi1 Ti 0 0 0 0.003\nO1 O 0 0 0.25 0.004\n"
            "O2 O 0.244 0.744 0 0.004",
            1,
        ),
        (
            "P b n m",
            (5.38, 5.44, 7.64),
            "Ca1 Ca 0.993 0.036 0.25 0.005\nTi1 Ti 0 0.5 0 0.005\nO1 O 0.071 0.484 0.25 0.005\n"
            "O2 O 0.711 0.289 0.037 0.005",
            7,
        ),
    ],
)
def test_number_of_free_coordinates_is_that_of_published_refinements(
    group: str, cell: tuple[float, float, float], atoms: str, count: int
) -> None:
    phase = phase_on_orthogonal_axes("phase", group, cell, atoms)
    modes = free_coordinates(phase)
    assert modes.shape == (count, len(phase.positions), 3)


def test_first_site_of_polar_phases_is_fixed(campaign: Campaign) -> None:
    cubic, tetragonal, trigonal = campaign.phases
    assert len(free_coordinates(cubic)) == 0
    for phase in (tetragonal, trigonal):
        modes = free_coordinates(phase)
        assert len(modes) == 3
        barium = phase.symbols.index("Ba")
        assert not modes[:, barium].any()
    # Each moves its first atom by an ångström.
    lengths = np.linalg.norm(free_coordinates(tetragonal) * tetragonal.cell[:3], axis=2)
    np.testing.assert_allclose(lengths.max(axis=1), 1.0)


def test_displaced_atoms_keep_the_space_group(campaign: Campaign) -> None:
    generator = np.random.default_rng(0)
    for phase in campaign.phases[1:]:
        modes = free_coordinates(phase)
        moved = displaced(phase, modes, generator.normal(0, 0.05, len(modes)))
        for op in phase.group_ops:
            rotation, shift = np.array(op.rot) / op.DEN, np.array(op.tran) / op.DEN
            for symbol, position in zip(moved.symbols, moved.positions, strict=True):
                image = rotation @ position + shift
                apart = moved.positions - image
                apart = np.linalg.norm(apart - np.round(apart), axis=1)
                assert moved.symbols[apart.argmin()] == symbol
                assert apart.min() < 1e-9


@pytest.mark.slow
def test_the_simulator_displaces_atoms(campaign: Campaign) -> None:
    c = campaign
    simulator = simulator_for(c)
    cells = np.array([[3.99, 3.99, 4.03, 90, 90, 90]] * 4)
    shifts = np.array([[0.02, 0.01, -0.03], [0, 0, 0], [0.02, 0.01, -0.03], [-0.02, 0, 0]])
    phase = np.full(4, 1)
    patterns = simulator.simulate(phase, cells, shifts=shifts)
    modes = simulator.free_coordinates(1)
    exact_ones = exact_patterns(
        [displaced(c.phases[1], modes, shift) for shift in shifts],
        cells[0],
        c.instrument,
        c.grid.tof,
        size=c.size,
        microstrain=c.microstrain,
    )
    for row, exact in zip(patterns, exact_ones, strict=True):
        assert np.abs(row - exact).max() < 1e-4 * exact.max()
    np.testing.assert_array_equal(patterns[0], patterns[2])
    assert np.abs(patterns[0] - patterns[1]).max() > 1e-3 * patterns.max()
    varied = simulator.simulate(phase, cells, shifts=shifts, size=np.full(4, c.size))
    assert np.abs(varied - patterns).max() < 5e-4 * patterns.max()
