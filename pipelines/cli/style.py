"""Colours, symbols and units of crystal systems and cell parameters, in figures and tables."""

from __future__ import annotations

from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem

SYSTEM_COLORS = dict(
    zip(
        CrystalSystem,
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
        strict=True,
    )
)
"""Okabe and Ito's colours, which people with colour blindness tell apart, one for each system."""

SYMBOLS = dict(zip(CELL_PARAMETERS, "abcαβγ", strict=True))
"""Symbols of the cell parameters."""

UNITS = {name: "Å" if name in "abc" else "°" for name in CELL_PARAMETERS}
"""Units of the cell parameters."""
