"""Scattering lengths that depend on the wavelength, against periodictable's own function."""

import numpy as np
import periodictable
import pytest
from hypothesis import given
from hypothesis import strategies as st
from periodictable.nsf import neutron_wavelength

from bragg_data.campaign import load_campaign
from bragg_data.crystallography import scattering
from bragg_data.crystallography.cell import d_spacing
from bragg_data.crystallography.reflections import unique_reflections
from bragg_data.crystallography.scattering import (
    ResonanceError,
    is_resonant,
    resonant_scattering_length,
    scattering_length,
)
from bragg_data.crystallography.structure import phase_from_cif, phase_on_orthogonal_axes
from bragg_data.instrument.instprm import TofGrid
from bragg_data.simulation.kinematic import Simulator
from tests.bragg_data.crystallography.test_published_structures import cif
from tests.exact_pattern import exact_pattern


@pytest.mark.parametrize("symbol", ["Sm", "Eu", "Gd", "Er", "Yb", "Lu", "157Gd", "164Dy", "167Er"])
def test_resonant_lengths_are_those_of_periodictable(symbol: str) -> None:
    element = symbol.lstrip("0123456789")
    mass = symbol[: -len(element)]
    atom = periodictable.elements.isotope(f"{mass}-{element}" if mass else element)
    wavelength = np.array([0.01, *atom.neutron.nsf_table[0], 20.0])
    expected, _ = atom.neutron.scattering_by_wavelength(wavelength)
    assert is_resonant(symbol)
    lengths = resonant_scattering_length(symbol, wavelength)
    np.testing.assert_allclose(lengths, expected / 10, atol=1e-12)


@given(at=st.floats(0.05, 0.5), gamma=st.floats(0.06, 0.2), strength=st.floats(-0.5, 0.5))
def test_a_resonance_is_followed_between_the_values_of_the_table(at, gamma, strength) -> None:
    """Of Breit and Wigner, tabulated as those of the rare earths are, in steps of 10 meV."""

    def amplitude(energy: np.ndarray) -> np.ndarray:
        return 5.0 + strength / (energy - at + 0.5j * gamma)

    energy = np.arange(0.01, 0.605, 0.01)
    table = neutron_wavelength(1000 * energy)[::-1], amplitude(energy)[::-1]
    between = np.linspace(0.03, 0.58, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scattering, "resonance_table", lambda _: table)
        lengths = resonant_scattering_length("Sm", neutron_wavelength(1000 * between))
    peak = 2 * abs(strength) / gamma
    assert np.abs(10 * lengths - amplitude(between)).max() < 2e-3 * peak + 1e-9


def test_elements_without_a_table_are_refused() -> None:
    for symbol in ("Cd", "Rh"):
        assert not is_resonant(symbol)
        with pytest.raises(ResonanceError, match=r"no table.*--simulator gsas2"):
            scattering_length(symbol)
    assert scattering_length("Dy") == pytest.approx(1.69 - 0.02764j, abs=1e-4)
    assert scattering_length("11B") == pytest.approx(0.665)
    assert scattering_length("7Li") == pytest.approx(-0.228)


@pytest.mark.parametrize("group", ["P m -3 m", "P 4 m m"])
def test_structure_factors_of_resonant_elements(group: str) -> None:
    """Two resonant elements and a constant one, next to a direct sum for each reflection."""
    lengths = (3.9, 3.9, 3.9 if "3" in group else 4.1)
    z = ".5" if "3" in group else ".54"
    atoms = f"Gd1 Gd 0 0 0 0.004\nEu1 Eu .5 .5 {z} 0.006\nO1 O .5 .5 0 0.008"
    phase = phase_on_orthogonal_axes("x", group, lengths, atoms)
    with pytest.raises(ResonanceError, match="give the scattering angle"):
        unique_reflections(phase, (3, 3, 3))
    phase = phase.at_angle(-90.0)
    unique = unique_reflections(phase, (3, 3, 3))
    d = d_spacing(unique.hkl, phase.cell[None])[0]
    expected = []
    for hkl, spacing in zip(unique.hkl, d, strict=True):
        wavelength = 2 * spacing * np.sin(np.radians(45.0))
        at = np.array([wavelength])
        b = {s: 10 * resonant_scattering_length(s, at)[0] for s in ("Gd", "Eu")}
        b["O"] = periodictable.O.neutron.b_c
        f = np.array([b[s] for s in phase.symbols]) / 10
        f = f * np.exp(-2 * np.pi**2 * phase.u_iso / spacing**2)
        waves = np.exp(2j * np.pi * phase.positions @ hkl)
        mates = abs((f * waves).sum()) ** 2, abs((f * waves.conj()).sum()) ** 2
        expected.append(np.mean(mates))
    np.testing.assert_allclose(unique.f_squared(d), expected, atol=1e-9 * max(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Scattering lengths of")
@pytest.mark.parametrize("symbol", ["Gd", "Er", "Sm"])
def test_fast_simulator_of_resonant_elements_is_exact(symbol: str) -> None:
    campaign = load_campaign("batio3-nomad")
    phase = phase_from_cif(cif("baddeleyite").replace(" Zr ", f" {symbol} "), "phase")
    grid = TofGrid(4000.0, campaign.grid.relative_step, 1500)
    fast = Simulator([phase], campaign.instrument, grid, size=1.0, microstrain=1e3)
    cells = np.array([phase.cell, phase.cell + np.array([0.05, -0.04, 0.03, 0.0, 0.4, 0.0])])
    scales = np.array([1.0, 1.4])
    patterns = fast.simulate(np.zeros(2, int), cells, u_scale=scales)
    for cell, scale, pattern in zip(cells, scales, patterns, strict=True):
        exact = exact_pattern(
            fast.phases[0],
            cell,
            campaign.instrument,
            grid.tof,
            size=1.0,
            microstrain=1e3,
            u_scale=float(scale),
        )
        assert np.abs(pattern - exact).max() < 1e-4 * exact.max()
    # Displaced atoms: the strengths are computed from the same groups.
    modes = fast.free_coordinates(0)
    shifted = fast.simulate(np.zeros(1, int), cells[:1], shifts=np.zeros((1, len(modes))))
    np.testing.assert_allclose(shifted[0], patterns[0], atol=1e-5 * patterns[0].max())


def test_wavelengths_beyond_the_table_are_reported() -> None:
    campaign = load_campaign("batio3-nomad")
    phase = phase_from_cif(cif("baddeleyite").replace(" Zr ", " Er "), "phase")
    grid = TofGrid(16000.0, campaign.grid.relative_step, 256)
    with pytest.warns(UserWarning, match=r"Er are tabulated from 0\.37 to 2\.86 Å"):
        Simulator([phase], campaign.instrument, grid, size=1.0, microstrain=1e3)
