"""Bound coherent scattering lengths of elements and isotopes, constant or resonant."""

import re

import numpy as np
import periodictable
from numpy.typing import NDArray
from periodictable.nsf import Neutron, neutron_energy

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CrystalError

# Elements with a resonance in the thermal range of which periodictable has no table (GSAS-II has
# Breit-Wigner terms; Lynn & Seeger, ADNDT 44 (1990) 191).
_WITHOUT_TABLE = frozenset({"Cd", "Rh", "103Rh"})

# An imaginary scattering length below this share of |b| changes |F|² by less than 1e-4.
_NEGLIGIBLE_IMAGINARY = 0.01

_ELEMENTS = frozenset(e.symbol for e in periodictable.elements if e.number) | {"D", "T"}
_HYDROGEN = {"1H": "1H", "2H": "D", "3H": "T"}
# Mass number, element, and a mass number behind it (B_11; a hyphen may be a charge: O-2).
_TYPE = re.compile(r"(\d{0,3})[-_]?([A-Za-z]{1,2})(?:_(\d{1,3})|-([5-9]|\d{2,3}))?")


class ResonanceError(CrystalError):
    """An element whose scattering length depends on the wavelength."""


def scatterer(text: str, *, label: bool = False) -> str | None:
    """Return the element or isotope of an atom type of a CIF, without its charge.

    'Si4+' gives 'Si', '11B' and 'B_11' give '11B', '2H' gives 'D'; None if the type names none.
    Of a ``label`` (O1, OW2) the first letter counts where two are no element, and no isotope.
    """
    match = _TYPE.match(text)
    if match is None:
        return None
    mass, letters, *behind = match.groups()
    element = letters.capitalize()
    if element not in _ELEMENTS and label:
        element = element[0]
    if element not in _ELEMENTS:
        return None
    mass = "" if label else mass or next((m for m in behind if m), "")
    isotope = f"{mass}{element}"
    return _HYDROGEN.get(isotope, isotope)


def element_of(symbol: str) -> str:
    """Return the element of an isotope's symbol, for example B of 11B; D stays D."""
    return symbol.lstrip("0123456789")


def atomic_mass(symbol: str) -> float:
    """Return the mass of an element or isotope in u."""
    element = element_of(symbol)
    number = symbol[: -len(element)]
    atom = periodictable.elements.isotope(f"{number}-{element}" if number else symbol)
    return float(atom.mass)


def absorption_cross_section(symbol: str) -> float:
    """Return the cross section of absorption at 1.798 Å in barn."""
    return float(_neutron(symbol).absorption or 0.0)


def _neutron(symbol: str) -> Neutron:
    element = element_of(symbol)
    mass = symbol[: -len(element)] if element else ""
    try:
        neutron: Neutron = periodictable.elements.isotope(
            f"{mass}-{element}" if mass else symbol
        ).neutron
        known = neutron.b_c
    except (ValueError, AttributeError) as error:
        raise CrystalError(
            f"Element '{symbol}' has no neutron scattering length. Correct the CIF's atom types."
        ) from error
    if known is None:
        raise CrystalError(
            f"Element '{symbol}' has no measured neutron scattering length, so no pattern of it "
            f"can be simulated."
        )
    return neutron


def resonance_table(symbol: str) -> tuple[Array, NDArray[np.complex128]] | None:
    """Return wavelengths in Å, ascending, and scattering lengths in fm of a resonant element.

    Lynn & Seeger, ADNDT 44 (1990) 191, by way of periodictable: in steps of 10 meV, rounded to
    0.01 fm. None for elements without a table.
    """
    table: tuple[Array, NDArray[np.complex128]] | None = _neutron(symbol).nsf_table
    return table


def is_resonant(symbol: str) -> bool:
    """Return whether the scattering length of an element or isotope has a table over wavelength."""
    return resonance_table(symbol) is not None


def resonance_range(symbol: str) -> tuple[float, float]:
    """Return the shortest and longest wavelength in Å of a resonant element's table."""
    table = resonance_table(symbol)
    assert table is not None  # is_resonant
    return float(table[0].min()), float(table[0].max())


def scattering_length(symbol: str) -> complex:
    """Return the bound coherent scattering length of an element or isotope in 1e-12 cm (10 fm).

    The values are those of the periodictable package (Rauch & Waschkowski; Sears, Neutron News 3
    (1992) 26). An imaginary part (absorption, for example boron) is kept where it matters.

    Raises a CrystalError for an element without a tabulated value, a ResonanceError for one with a
    resonance in the thermal range.
    """
    neutron = _neutron(symbol)
    if is_resonant(symbol):
        raise ResonanceError(
            f"Element '{symbol}' has a resonance in the thermal range: its scattering length "
            f"varies with wavelength. Give the scattering angle (Phase.at_angle), or use "
            f"--simulator gsas2."
        )
    if symbol in _WITHOUT_TABLE or neutron.is_energy_dependent:
        raise ResonanceError(
            f"Element '{symbol}' has a resonance in the thermal range, of which there is no table: "
            f"its scattering length varies with wavelength, which the kinematic simulator does not "
            f"model. Use --simulator gsas2 for this structure."
        )
    b, imaginary = neutron.b_c or 0.0, getattr(neutron.b_c_complex, "imag", 0.0)
    matters = abs(imaginary) >= _NEGLIGIBLE_IMAGINARY * abs(b)
    return complex(b, imaginary if matters else 0.0) / 10.0


def resonant_scattering_length(symbol: str, wavelength: Array) -> NDArray[np.complex128]:
    """Return the scattering length of a resonant element in 1e-12 cm at wavelengths in Å.

    A cubic spline in the energy through the values of :func:`resonance_table`; beyond the table,
    :func:`resonance_range`, its first and last value. Lines between the values would be up to
    0.2 fm off at a resonance, which is as wide as a few steps of the table; the spline is 0.01 fm.
    """
    from scipy.interpolate import CubicSpline  # slow to import, and seldom needed

    table = resonance_table(symbol)
    assert table is not None  # is_resonant
    energy = neutron_energy(table[0])[::-1]
    inside = np.clip(neutron_energy(np.asarray(wavelength)), energy[0], energy[-1])
    return np.asarray(CubicSpline(energy, table[1][::-1])(inside), dtype=np.complex128) / 10.0
