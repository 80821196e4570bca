"""Colours of the crystal systems, symbols and units of the cell parameters."""

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from bragg_data.crystallography.structure import Phase

# Okabe and Ito's colours, distinguishable with colour blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYSTEM_COLORS = dict(zip(CrystalSystem, _COLORS, strict=True))
SYMBOLS = dict(zip(CELL_PARAMETERS, "abcαβγ", strict=True))
UNITS = {name: "Å" if name in "abc" else "°" for name in CELL_PARAMETERS}


def free_parameters_text(cell: Array, phase: Phase, form: str = "g") -> str:
    """Return the free parameters of a cell, shape (6,), as text: ``a = 4 Å, α = 89.8°``."""
    values = zip(CELL_PARAMETERS, cell, strict=True)
    return ", ".join(
        f"{SYMBOLS[name]} = {value:{form}}{' Å' if name in 'abc' else '°'}"
        for name, value in values
        if name in phase.lattice.free_parameters
    )
