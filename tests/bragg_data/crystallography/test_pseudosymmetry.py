"""Cells that a nearly more symmetric lattice offers instead of another one."""

import numpy as np
import pytest

from bragg_data.crystallography.pseudosymmetry import pseudosymmetric_cells
from tests.measured_banks import structure


def test_axes_that_are_nearly_equivalent_are_exchanged() -> None:
    """BaTiO₃ in Amm2: a, b/√2 and c/√2 are edges of a cube, but for half a per cent."""
    phase = structure("batio3_amm2")
    free = np.array([3.98, 5.68, 5.70])
    alternatives = pseudosymmetric_cells(phase, free)
    assert any(np.allclose(cell, [3.98, 5.70, 5.68], rtol=1e-9) for cell in alternatives)
    volume = np.prod(free)
    for cell in alternatives:
        assert np.prod(cell) == pytest.approx(volume, rel=2e-3)
        assert np.abs(cell / free - 1).max() < 0.015


def test_a_lattice_far_from_a_higher_symmetry_has_none() -> None:
    phase = structure("kyanite")
    assert pseudosymmetric_cells(phase, phase.cell) == []


def test_few_parameters_leave_nothing_to_exchange() -> None:
    assert pseudosymmetric_cells(structure("srtio3"), np.array([5.51, 7.80])) == []
